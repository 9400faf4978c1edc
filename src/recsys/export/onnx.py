"""The encoder as an ONNX graph that answers as torch does, for any batch and length.

Shapes: B batch, L history length, H interests, D dim.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.artifacts import sha256
from recsys.export.runtime import OUTPUT, Encoder
from recsys.history import OWN_RECENCY, Arrays, Histories, encode
from recsys.schema import EVENT_TYPES

if TYPE_CHECKING:
    import onnx

OPSET = 23
"""The first opset with attention as one node; at 20 a masked row gave NaN in ONNX Runtime."""
TOLERANCE = 1e-4
MAX_BATCH = 4096
BY_LENGTH = ("items", "types", "gaps", "times")
"""Inputs of shape [batch, length]; all others are [batch]."""


class ExportError(RuntimeError):
    """The exported graph is not what the model computes."""


def export_encoder(model: nn.Module, path: Path) -> str:
    """Write the model's forward as one ONNX file and return the file's SHA-256.

    Inputs are int64 and named as `model.inputs`, batch and length free; the output is `queries`
    [batch, interests, dim]. Raises ExportError where the graph's shapes are fixed or its answers
    differ from torch's by more than 1e-4 on random histories.
    """
    assert not model.training, "call model.eval() first: dropout must not be exported"
    inputs, max_length = _interface(model)
    arrays = random_arrays(model, batch=2, length=min(max_length, 5))
    example = tuple(torch.from_numpy(arrays[name]) for name in inputs)
    _write(_traced(model, example), path)
    check_symbolic(path, inputs)
    check_parity(model, path)
    return sha256(path)


def _traced(model: nn.Module, example: tuple[Tensor, ...]) -> onnx.ModelProto:
    inputs, max_length = _interface(model)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Variadic(model),
                example,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_shapes=_dynamic_shapes(inputs, max_length),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"{type(model).__name__} does not export to ONNX: {error.__cause__ or error}; forward "
            "must not loop over, or branch on, batch or length"
        ) from error
    assert program is not None
    return program.model_proto


def check_symbolic(path: Path, inputs: Sequence[str]) -> None:
    """Raise ExportError where the graph's inputs are others, or a size is baked into one."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    shapes = {value.name: _dims(value) for value in graph.input}
    if tuple(shapes) != tuple(inputs):
        raise ExportError(f"{path}: graph reads {', '.join(shapes)}; the model {', '.join(inputs)}")
    fixed = {name: dims for name, dims in shapes.items() if not all(map(_is_name, dims))}
    if fixed:
        raise ExportError(
            f"{path}: sizes are baked into the graph: {fixed}; forward must not loop over, or "
            "branch on, batch or length"
        )


def check_parity(model: nn.Module, path: Path) -> float:
    """Compare torch with ONNX Runtime over batch sizes and lengths: the largest difference."""
    inputs, longest = _interface(model)
    encoder = Encoder.open(path, inputs, longest)
    lengths = sorted({1, 2, max(1, longest // 2), longest})
    cases = [(batch, length) for batch in (1, 3, 17) for length in lengths]
    worst = max(difference(model, encoder, random_arrays(model, *case)) for case in cases)
    if not worst <= TOLERANCE:
        raise ExportError(f"{path}: differs from torch by {worst:.2g}, allowed are {TOLERANCE:.2g}")
    return worst


def difference(model: nn.Module, encoder: Encoder, arrays: Arrays) -> float:
    """Return the largest absolute difference of the two runtimes' queries."""
    with torch.no_grad():
        wanted = model(*(torch.from_numpy(arrays[name]) for name in encoder.inputs)).numpy()
    return float(np.abs(encoder.run(arrays) - wanted).max())


def random_arrays(model: nn.Module, batch: int, length: int, seed: int = 0) -> Arrays:
    """Return encoded random histories for a model: the first has `length` events, none has more."""
    rng = np.random.default_rng([seed, batch, length])
    num_items = len(model.item_vectors()) - 1  # type: ignore[operator]
    lengths = [length, *rng.integers(1, length + 1, batch - 1).tolist()]
    histories = Histories.of([_random_history(rng, count, num_items) for count in lengths])
    now = np.full(batch, rng.integers(10**12, 2 * 10**12))
    recency = rng.choice(np.array([OWN_RECENCY, 0, 0.5, 1], np.float32), batch)
    arrays = encode(histories, _interface(model)[1], now, recency)
    return arrays | {"users": rng.integers(0, 2, batch)}


def _random_history(
    rng: np.random.Generator, count: int, num_items: int
) -> tuple[NDArray, NDArray, NDArray]:
    gaps = np.exp(rng.uniform(0, 20, count)).astype(np.int64)
    return (
        rng.integers(1, num_items + 1, count),
        rng.integers(1, len(EVENT_TYPES) + 1, count),
        10**12 + np.cumsum(gaps),
    )


def _interface(model: nn.Module) -> tuple[tuple[str, ...], int]:
    return cast("tuple[str, ...]", model.inputs), cast(int, model.max_length)


class _Variadic(nn.Module):
    """Gives every model the one signature that `_dynamic_shapes` describes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arrays: Tensor) -> Tensor:
        return cast(Tensor, self.model(*arrays))


def _dynamic_shapes(inputs: Sequence[str], max_length: int) -> Any:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    length = torch.export.Dim("length", min=1, max=max_length)
    shapes = [{0: batch, 1: length} if name in BY_LENGTH else {0: batch} for name in inputs]
    return (tuple(shapes),)  # one variadic argument is a tuple to the exporter


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Save the graph without the exporter's notes of source files and lines."""
    graph = proto.graph
    noted = (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info)
    for part in (*noted, *graph.initializer):
        del part.metadata_props[:]
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _is_name(dim: str | int) -> bool:
    return isinstance(dim, str)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice off the terminal."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
