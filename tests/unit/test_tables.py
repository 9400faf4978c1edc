"""Sharded tables apart from the processes that share them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.launch import configure, explain_config, open_dataset
from recsys.losses import ItemSide, bce, full_softmax, in_batch_softmax, sampled_softmax
from recsys.models.tables import Sharded, ShardedTable, sharded_tables, whole
from recsys.schema import InputError
from recsys.training import shards
from recsys.training.retrieval import RetrievalJob
from recsys.training.sharded import read_by
from recsys.training.shards import check_torchrec
from recsys.training.table_file import TableFile, read_tables


def test_fetched_rows_answer_as_a_whole_table_does() -> None:
    """Values and gradients, which padding has none of."""
    expected = whole(9, 4)
    ids_U, asked = torch.tensor([0, 2, 5, 7]), torch.tensor([[5, 0, 5], [7, 2, 0]])
    rows_UD = expected.weight[ids_U].detach().requires_grad_()
    table = Sharded()(9, 4)
    table.fetch(ids_U, rows_UD)
    assert table(asked).equal(expected(asked))
    weights = torch.arange(24.0).view(2, 3, 4)
    (table(asked) * weights).sum().backward()
    (expected(asked) * weights).sum().backward()
    assert rows_UD.grad.equal(expected.weight.grad[ids_U])


def test_a_checkpoint_has_no_vectors_and_the_file_has_all(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.items, model.users = ShardedTable(70, 4), ShardedTable(3, 4)
    rows = {name: torch.rand(t.num_embeddings, 4) for name, t in sharded_tables(model).items()}
    file = TableFile.create(tmp_path / "t", {name: tuple(r.shape) for name, r in rows.items()})
    for name, vectors in rows.items():
        for first in (0, 1):  # in parts, as processes do
            file.write(name, first, vectors[first:])
    read_tables(sharded_tables(model), file.path)
    assert model.items(torch.tensor([69, 1])).equal(rows["items"][[69, 1]])
    assert model.users(torch.tensor([2])).equal(rows["users"][[2]])
    assert not model.state_dict()


def test_a_file_of_another_dataset_is_refused(tmp_path: Path) -> None:
    file = TableFile.create(tmp_path / "t", {"items": (3, 4)})
    with pytest.raises(InputError, match=r"a table of \(3, 4\), expected \(5, 4\)"):
        read_tables({"items": ShardedTable(5, 4)}, file.path)
    with pytest.raises(InputError, match=r"gone is missing; copy it"):
        TableFile(tmp_path / "gone").rows("items")


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_where_vectors_start_does_not_depend_on_the_processes(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    every = shards._drawn(1, "items", 0, 10, 4)
    halves = [shards._drawn(1, "items", first, 5, 4) for first in (0, 5)]
    assert torch.cat(halves).equal(every)
    assert not every[0].any()
    assert len(every.unique(dim=0)) == 10
    assert not every.equal(shards._drawn(2, "items", 0, 10, 4))


@pytest.mark.parametrize(
    ("loss", "others"),
    [(partial(sampled_softmax, negatives=5, by="popularity"), 5), (bce, 1), (in_batch_softmax, 3)],
)
def test_what_a_loss_reads_is_known_before(loss: partial, others: int) -> None:
    """Every row that it then asks for is there."""
    targets, vectors = torch.tensor([[3, 4, 0], [9, 0, 0]]), torch.rand(10, 4)
    asked: list[torch.Tensor] = []

    def of(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids)
        return vectors[ids]

    side = ItemSide(lambda: vectors, of, torch.full((10,), 1 / 9), torch.Generator())
    if loss is in_batch_softmax:
        loss = partial(loss, uniform_negatives=0)
    side.generator.manual_seed(1)
    read = read_by(loss, side, targets)
    side.generator.manual_seed(1)
    loss(torch.rand(3, 4), targets[targets > 0], side)
    assert len(read) == others
    assert set(torch.cat(asked).tolist()) <= {*read.tolist(), 3, 4, 9}


def test_a_loss_over_all_items_is_refused() -> None:
    with pytest.raises(InputError, match=r"loss=full_softmax scores every.*loss=sampled_softmax"):
        read_by(partial(full_softmax, chunk=2), None, torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"torchrec": None, "fbgemm-gpu-cpu": None}, "torchrec not installed, fbgemm-gpu-cpu not"),
        ({"torchrec": "1.9.1", "fbgemm-gpu-cpu": "1.8.0"}, "found torchrec 1.9.1, fbgemm-gpu-cpu"),
        ({"torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}, "which do not load (ImportError: no x"),
    ],
)
def test_a_mismatched_torchrec_is_named_with_what_to_type(
    there: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shards, "_version", there.get)
    monkeypatch.setattr(shards.importlib, "import_module", _fails)
    with pytest.raises(InputError) as error:
        check_torchrec()
    assert said in str(error.value)
    assert "needs torchrec 1.8.0 and fbgemm-gpu-cpu 1.8.0" in str(error.value)
    assert "pip install --no-deps torchrec==1.8.0" in str(error.value)


def _fails(name: str) -> None:
    raise ImportError("no x\nin a long trace")


def test_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(InputError, match=r"tried with torch 2\.13 alone, this is torch 2\.12\.1"):
        check_torchrec()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("", "loss=full_softmax scores every item"),
        ("loss=sampled_softmax loss.by=adaptive", "type loss.by=popularity"),
        ("loss=sampled_softmax", "cuts tables over processes: add trainer=ddp"),
        ("loss=sampled_softmax trainer=ddp schedule=cosine", "schedule=cosine does not reach"),
        ("loss=sampled_softmax trainer=ddp averaging=2", "averaging=2 does not reach"),
        ("loss=sampled_softmax trainer=ddp item_start=cooccurrence", "type item_start=random"),
        ("loss=sampled_softmax model.dim=30", "use 32"),
        ("embedding.by=column_wise", "embedding.by=column_wise: expected row_wise or table_wise"),
        ("embedding.optimizer=adam", "expected rowwise_adagrad or adagrad"),
        ("embedding.lr=0", "embedding.lr=0"),
        ("model=ranker batches=shown examples=impressions", "embedding=sharded has no effect on"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: str, problem: str, ring: Dataset) -> None:
    def begin() -> None:
        RetrievalJob(configure(["embedding=sharded", *settings.split()]), ring)

    with pytest.raises(Exception, match=r".") as error:  # Hydra wraps those of a constructor
        begin()
    assert problem in str(explain_config(error.value))


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory, ring_csv: Path) -> Dataset:
    config = configure(["data=events", f"data.path={ring_csv}"])
    return open_dataset(config, Workspace(tmp_path_factory.mktemp("ring")))
