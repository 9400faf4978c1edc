"""A model as an ONNX graph that answers as torch does, for any batch, length and candidates.

Shapes: B batch, L history length, C candidates, H interests, D dim, T tasks, W codes, G numbers.
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
from recsys.export.runtime import OUTPUT, Encoder, open_session
from recsys.features import Field, Layout
from recsys.history import (
    GAP_BUCKETS,
    OWN_RECENCY,
    VALUE_BUCKETS,
    Arrays,
    Histories,
    encode,
)
from recsys.models.ranker import Calibrated
from recsys.schema import EVENT_TYPES

if TYPE_CHECKING:
    import onnx

OPSET = 23
"""The first opset with attention as one node; at 20 a masked row gave NaN in ONNX Runtime."""
TOLERANCE = 1e-4
MAX_BATCH = 4096
BY_LENGTH = ("items", "types", "gaps", "times", "values", "path_codes", "path_embeddings")
"""Inputs of shape [batch, length, …]."""
BY_CANDIDATE = (
    "item_codes",
    "item_embeddings",
    "item_numbers",
    "item_vectors",
    "cross_numbers",
    "retrieval_scores",
    "candidate_vectors",
)
"""Inputs of shape [batch, candidates, …]."""
BY_INTEREST = ("queries",)
"""Inputs of shape [batch, interests, …]; all others are [batch, …]."""
PROBABILITIES = "probabilities"
MAX_CANDIDATES, MAX_INTERESTS = 1 << 16, 64


class ExportError(RuntimeError):
    """The exported graph is not what the model computes."""


def export_encoder(model: nn.Module, path: Path) -> str:
    """Write the model's forward as one ONNX file and return the file's SHA-256.

    Inputs are int64 and named as `model.inputs`, batch and length free; the output is `queries`
    [batch, interests, dim]. Raises ExportError where the graph's shapes are fixed or its answers
    differ from torch's by more than 1e-4 on random histories.
    """
    inputs, max_length = _interface(model)
    arrays = random_arrays(model, batch=2, length=min(max_length, 5))
    _write(_traced(model, arrays, OUTPUT), path)
    check_symbolic(path, inputs)
    check_parity(model, path)
    return sha256(path)


def export_ranker(model: Calibrated, layout: Layout, path: Path) -> str:
    """Write a calibrated ranker as one ONNX file and return the file's SHA-256.

    Inputs are named as `model.inputs`, batch, candidates and length free; the output is
    `probabilities` [batch, candidates, tasks]. Raises ExportError as `export_encoder` does.
    """
    arrays = random_shown(model, layout, batch=2, candidates=3, length=min(model.max_length, 5))
    _write(_traced(model, arrays, PROBABILITIES), path)
    check_symbolic(path, model.inputs)
    session = open_session(path)
    lengths = sorted({1, 2, model.max_length})
    worst = max(
        _distance(model, session, random_shown(model, layout, batch, candidates, length))
        for batch, candidates in ((1, 1), (1, 50), (3, 7))
        for length in lengths
    )
    _check_near(path, worst)
    return sha256(path)


def _distance(model: nn.Module, session: Any, arrays: Arrays) -> float:
    """Return how far ONNX Runtime's answer is from torch's; of values above 1 relatively."""
    inputs, _ = _interface(model)
    with torch.no_grad():
        wanted = model(*(torch.from_numpy(arrays[name]) for name in inputs)).numpy()
    met = session.run(None, {name: arrays[name] for name in inputs})[0]
    return float((np.abs(met - wanted) / np.maximum(1, np.abs(wanted))).max())


def random_shown(
    model: Calibrated, layout: Layout, batch: int, candidates: int, length: int
) -> Arrays:
    """Return random inputs of a ranker: codes and numbers as `layout` has them, some missing."""
    rng = np.random.default_rng([batch, candidates, length])
    some, many = (batch,), (batch, candidates)
    path, width = (batch, length), model.ranker.embedding_width
    arrays: Arrays = {
        "request_codes": _codes(rng, layout.request_codes, some),
        "request_numbers": _numbers(rng, (*some, len(layout.request_numbers))),
        "item_codes": _codes(rng, layout.item_codes, many),
        "item_embeddings": rng.normal(size=(*many, width)).astype(np.float32),
        "item_numbers": _numbers(rng, (*many, len(layout.item_numbers))),
        "item_vectors": rng.normal(size=(*many, layout.vector_width)).astype(np.float32),
        "cross_numbers": _numbers(rng, (*many, len(layout.cross_numbers))),
        "retrieval_scores": _numbers(rng, many),
        "queries": rng.normal(size=(*some, 2, model.retriever)).astype(np.float32),
        "candidate_vectors": rng.normal(size=(*many, model.retriever)).astype(np.float32),
        "path_codes": _codes(rng, layout.item_codes, path),
        "path_embeddings": rng.normal(size=(*path, width)).astype(np.float32),
        "types": rng.integers(1, len(EVENT_TYPES) + 1, path),
        "gaps": rng.integers(0, GAP_BUCKETS, path),
        "values": rng.integers(0, VALUE_BUCKETS, path),
        "lengths": np.append(rng.integers(0, length + 1, batch - 1), length),
    }
    return {name: arrays[name] for name in model.inputs}


def _codes(
    rng: np.random.Generator, fields: Sequence[Field], shape: tuple[int, ...]
) -> NDArray[np.int64]:
    columns = [rng.integers(0, f.size, shape) for f in fields for _ in range(f.width)]
    return np.stack(columns, axis=-1) if columns else np.zeros((*shape, 0), np.int64)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    numbers = rng.normal(size=shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.1, np.float32(np.nan), numbers)


def _traced(model: nn.Module, arrays: Arrays, output: str) -> onnx.ModelProto:
    assert not model.training, "call model.eval() first: dropout must not be exported"
    inputs, max_length = _interface(model)
    example = tuple(torch.from_numpy(arrays[name]) for name in inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Variadic(model),
                example,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=list(inputs),
                output_names=[output],
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
    free = {name: dims[: _free(name)] for name, dims in shapes.items()}
    fixed = {name: shapes[name] for name, dims in free.items() if not all(map(_is_name, dims))}
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
    _check_near(path, worst)
    return worst


def _check_near(path: Path, worst: float) -> None:
    if not worst <= TOLERANCE:
        raise ExportError(f"{path}: differs from torch by {worst:.2g}, allowed are {TOLERANCE:.2g}")


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


def _random_history(rng: np.random.Generator, count: int, num_items: int) -> tuple[NDArray, ...]:
    gaps = np.exp(rng.uniform(0, 20, count)).astype(np.int64)
    return (
        rng.integers(1, num_items + 1, count),
        rng.integers(1, len(EVENT_TYPES) + 1, count),
        10**12 + np.cumsum(gaps),
        np.where(rng.random(count) < 0.5, np.nan, np.exp(rng.uniform(0, 10, count))),
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


def _free(name: str) -> int:
    """Return how many sizes of an input are free."""
    return 2 if name in (*BY_LENGTH, *BY_CANDIDATE, *BY_INTEREST) else 1


def _dynamic_shapes(inputs: Sequence[str], max_length: int) -> Any:
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    length = torch.export.Dim("length", min=1, max=max_length)
    candidates = torch.export.Dim("candidates", min=1, max=MAX_CANDIDATES)
    interests = torch.export.Dim("interests", min=1, max=MAX_INTERESTS)
    second = dict.fromkeys(BY_LENGTH, length) | dict.fromkeys(BY_CANDIDATE, candidates)
    second |= dict.fromkeys(BY_INTEREST, interests)
    shapes = [{0: batch, 1: second[n]} if n in second else {0: batch} for n in inputs]
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
