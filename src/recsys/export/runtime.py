"""Run an encoder graph over histories, without torch.

Shapes: B histories, H interests, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from recsys.history import Arrays, Histories, encode

if TYPE_CHECKING:
    import onnxruntime

OUTPUT = "queries"
CHUNK = 128


@dataclass(frozen=True)
class Encoder:
    """An encoder graph opened on one CPU thread, and what it reads."""

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    max_length: int

    @classmethod
    def open(cls, graph: Path | bytes, inputs: tuple[str, ...], max_length: int) -> Encoder:
        """Open an ONNX file, or its bytes."""
        return cls(open_session(graph), inputs, max_length)

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Return queries_BHD of encoded histories."""
        feed = {name: arrays[name] for name in self.inputs}
        return cast(NDArray[np.float32], self.session.run([OUTPUT], feed)[0])

    def queries(self, histories: Histories, users: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return queries_BHD of non-empty histories of user rows, asked for after their last event.

        Bounded memory: encoded a hundred or so at a time.
        """
        chunks = [slice(at, at + CHUNK) for at in range(0, len(histories), CHUNK)]
        return np.concatenate([self._chunk(_part(histories, c), users[c]) for c in chunks])

    def _chunk(self, histories: Histories, users: NDArray[np.integer]) -> NDArray[np.float32]:
        arrays = encode(histories, self.max_length, request_times(histories))
        return self.run(arrays | {"users": users.astype(np.int64) + 1})


def open_session(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """Open an ONNX file, or its bytes, on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    source = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def request_times(histories: Histories) -> NDArray[np.int64]:
    """Return the moment one millisecond after each history's last event: int64 [B]."""
    return np.asarray(histories.times[histories.offsets[1:] - 1] + 1, np.int64)


def _part(histories: Histories, rows: slice) -> Histories:
    offsets = histories.offsets[rows.start : rows.stop + 1]
    events = slice(offsets[0], offsets[-1])
    return histories.taking(events, offsets - offsets[0])
