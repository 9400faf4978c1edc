"""ONNX graphs as a server runs them: on a few threads, with inputs that it can give them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.schema import InputError

if TYPE_CHECKING:
    import onnxruntime

ENCODED = (
    *("items", "types", "gaps", "times", "lengths", "recency"),
    *("request_gap", "request_hour", "request_weekday", "users"),
)
"""Arrays that a server can give an encoder: those of `history.encode`, and `users`."""


def open_graph(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file; each call of it uses `threads` cores. Raises InputError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise InputError(f"{file}: not a readable ONNX graph: {error}") from error


def check_inputs(file: Path, inputs: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError where a graph reads something that a server cannot give it."""
    if unknown := [name for name in inputs if name not in known]:
        raise InputError(
            f"{file.parent}: its {file.stem} reads {', '.join(unknown)}, unknown to this recsys; "
            f"known are {', '.join(known)}; export it again with this version"
        )
