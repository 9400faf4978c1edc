"""ONNX graphs as a server runs them: on a few threads, with inputs that it can give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import structlog

from recsys.schema import InputError

if TYPE_CHECKING:
    import onnxruntime

log = structlog.get_logger("recsys.serving")
CPU = "CPUExecutionProvider"
CUDA = ("CUDAExecutionProvider", CPU)
PROVIDERS = {"cpu": (CPU,), "cuda": CUDA, "tensorrt": ("TensorrtExecutionProvider", *CUDA)}
"""What ONNX Runtime runs a graph with, by device; what one cannot run, the next one does."""
ENCODED = (
    *("items", "types", "gaps", "times", "values", "lengths", "recency"),
    *("request_gap", "request_hour", "request_weekday", "users"),
)
"""Arrays that a server can give an encoder: those of `history.encode`, and `users`."""

NO_SIZES: Mapping[str, int] = MappingProxyType({})


def open_graph(
    file: Path, threads: int, device: str = "cpu", sizes: Mapping[str, int] = NO_SIZES
) -> onnxruntime.InferenceSession:
    """Open an ONNX file on a device; on the CPU each call of it uses `threads` cores.

    sizes: those of its free sizes that will always be the same, by name: what follows from them is
    computed here, once. Where the device cannot be used, the CPU is, and the server's log says why.
    Raises InputError where the file is no graph.
    """
    if device != "cpu":
        try:
            return _opened(file, threads, _providers(device), sizes)
        except Unavailable as error:
            log.warning("device_unavailable", device=device, graph=file.name, reason=str(error))
    try:
        return _opened(file, threads, [CPU], sizes)
    except Unavailable as error:
        raise InputError(f"{file}: not a readable ONNX graph: {error}") from error


class Unavailable(Exception):
    """ONNX Runtime cannot run a graph with the wanted providers."""


def _providers(device: str) -> list[str]:
    """Return a device's providers, the first choice first; raise Unavailable without it."""
    import onnxruntime

    wanted, there = PROVIDERS[device], onnxruntime.get_available_providers()
    if wanted[0] not in there:
        raise Unavailable(
            f"onnxruntime {onnxruntime.__version__} has {', '.join(there)}, expected {wanted[0]}; "
            "answering on the CPU. Install onnxruntime-gpu in place of onnxruntime"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries, where they came by pip
    return [provider for provider in wanted if provider in there]


def _opened(
    file: Path, threads: int, providers: Sequence[str], sizes: Mapping[str, int]
) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise Unavailable(str(error)) from error
    # Without its libraries a provider is left out in silence.
    if session.get_providers()[0] != providers[0]:
        raise Unavailable(
            f"{providers[0]} is installed, but does not start; answering on the CPU. Check "
            "nvidia-smi, and that CUDA's, cuDNN's and TensorRT's libraries are those that "
            f"onnxruntime {onnxruntime.__version__} wants"
        )
    return session


def check_inputs(file: Path, inputs: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError where a graph reads something that a server cannot give it."""
    if unknown := [name for name in inputs if name not in known]:
        raise InputError(
            f"{file.parent}: its {file.stem} reads {', '.join(unknown)}, unknown to this recsys; "
            f"known are {', '.join(known)}; export it again with this version"
        )
