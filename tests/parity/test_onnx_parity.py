"""ONNX Runtime answers as torch does, for every shipped model and every history length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from recsys.config import config_dir
from recsys.data.catalogue import Catalogue, Codes
from recsys.export.onnx import ExportError, check_parity, difference, export_encoder, random_arrays
from recsys.export.runtime import Encoder
from recsys.launch import configure

HISTORIES = 1000
BATCH = 32
NUM_ITEMS, NUM_USERS = 300, 40
LAYERS = sorted(path.stem for path in (config_dir() / "model" / "layer").glob("*.yaml"))
SHIPPED = ["model=two_tower", *(f"model/layer={layer}" for layer in LAYERS)]
ROTARY = "model/layer=attention model.layer.rotary=true"
"""The setting under which attention's heads are turned, and so are not one node."""
SHARED = "embedding=hashed embedding.rows=50"
"""The setting under which ids share rows, found by arithmetic within the graph."""
CASES = [*(f"{name}{rich}" for name in SHIPPED for rich in ("", ", all features")), ROTARY, SHARED]


def catalogue(rich: bool) -> Catalogue:
    """A catalogue with everything that a model may read, or with nothing."""
    rng = np.random.default_rng(0)
    counts = np.concatenate([[0], np.sort(rng.integers(1, 99, NUM_ITEMS))[::-1]])
    if not rich:
        return Catalogue(NUM_ITEMS, NUM_USERS, counts)
    return Catalogue(
        NUM_ITEMS,
        NUM_USERS,
        counts,
        has_time=True,
        has_types=True,
        has_values=True,
        item_codes={"category": Codes(rng.integers(0, 5, NUM_ITEMS + 1), 5)},
        user_codes={"region": Codes(rng.integers(0, 4, NUM_USERS + 1), 4)},
        item_vectors={"vector": rng.normal(size=(NUM_ITEMS + 1, 8)).astype(np.float32)},
    )


RICH = {
    "user_ids": True,
    "user_features": ["region"],
    "item_features": ["category"],
    "item_vectors": ["vector"],
    "interests": 3,
    "blend": True,
}
"""What a config may ask for, where the dataset has it."""


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    encoder: Encoder


@pytest.fixture(scope="module", params=CASES)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model as its config makes it, with weights large enough to tell two answers apart."""
    name, _, rich = request.param.partition(", ")
    torch.manual_seed(0)
    whole = configure(name.split())
    config, table = whole.model, instantiate(whole.embedding)
    if rich:
        named = {key: value for key, value in RICH.items() if key in config}
        config = OmegaConf.merge(config, named)
    model = instantiate(config, _partial_=True)(catalogue=catalogue(bool(rich)), table=table).eval()
    enlarge(model)
    file = tmp_path_factory.mktemp("exported") / "encoder.onnx"
    export_encoder(model, file)
    return Exported(model, Encoder.open(file, model.inputs, model.max_length))


def enlarge(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for table in model.modules():
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            nn.init.zeros_(table.weight[table.padding_idx])


def test_there_are_models() -> None:
    assert SHIPPED


def test_thousand_histories_of_every_length(shipped: Exported) -> None:
    model, longest = shipped.model, shipped.model.max_length
    # Each batch has one history of its full length and others up to it; lengths go round.
    lengths = np.arange(max(HISTORIES // BATCH + 1, longest)) % longest + 1
    batches = [random_arrays(model, BATCH, int(length)) for length in lengths]
    seen = np.concatenate([arrays["lengths"] for arrays in batches])
    assert len(seen) >= HISTORIES
    assert set(seen) == set(range(1, longest + 1))
    assert max(difference(model, shipped.encoder, arrays) for arrays in batches) <= 1e-4


def test_batch_equals_single(shipped: Exported) -> None:
    arrays = random_arrays(shipped.model, 9, min(20, shipped.model.max_length))
    together = shipped.encoder.run(arrays)
    for row, length in enumerate(arrays["lengths"]):
        one = {name: values[[row]] for name, values in arrays.items()}
        cut = {n: v[:, :length] if v.ndim == 2 else v for n, v in one.items()}
        np.testing.assert_allclose(shipped.encoder.run(cut)[0], together[row], atol=1e-4)


class Tiny(nn.Module):
    """A one-layer causal model with the interface of the shipped ones."""

    inputs = ("items", "lengths")
    max_length = 12

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.items = nn.Embedding(51, 8, padding_idx=0)

    def forward(self, items_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        hidden_B1LD = self.items(items_BL)[:, None]
        read_B1LD = F.scaled_dot_product_attention(*[hidden_B1LD] * 3, is_causal=True)
        return read_B1LD[:, 0].gather(1, (lengths_B - 1)[:, None, None].expand(-1, 1, 8))

    def item_vectors(self) -> torch.Tensor:
        return self.items.weight


class Looping(Tiny):
    """Loops over the batch, which the exporter unrolls to the example's two rows."""

    def forward(self, items_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        rows = [self.items(row).sum(dim=0) for row in items_BL]
        return torch.stack(rows)[:, None]


class Hidden(Tiny):
    """Computes something else once it is traced."""

    def forward(self, items_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        query_B1D = super().forward(items_BL, lengths_B)
        return query_B1D + 1 if torch.compiler.is_exporting() else query_B1D


def test_named_arguments_export(tmp_path: Path) -> None:
    file = tmp_path / "encoder.onnx"
    export_encoder(Tiny().eval(), file)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]
    assert b".py" not in file.read_bytes()


def test_same_model_same_bytes(tmp_path: Path) -> None:
    one, two = (export_encoder(Tiny().eval(), tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert one == two


def test_baked_in_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError):
        export_encoder(Looping().eval(), tmp_path / "encoder.onnx")


def test_difference_from_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="differs from torch by 1"):
        export_encoder(Hidden().eval(), tmp_path / "encoder.onnx")


def test_other_weights_are_told_apart(tmp_path: Path) -> None:
    model = Tiny().eval()
    export_encoder(model, tmp_path / "encoder.onnx")
    assert check_parity(model, tmp_path / "encoder.onnx") < 1e-5
    nn.init.normal_(model.items.weight)
    with pytest.raises(ExportError, match="differs from torch"):
        check_parity(model, tmp_path / "encoder.onnx")
