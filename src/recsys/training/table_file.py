"""One safetensors file that many processes write their rows into, and any number read rows from.

Whatever wrote it, it holds each table whole, so a checkpoint of two processes is read by one, by
four, or by an export that knows nothing of processes. Format: huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.models.tables import ShardedTable
from recsys.schema import InputError

LENGTH = struct.Struct("<Q")
ITEM_BYTES = 4


class TableFile:
    """float32 tensors in a safetensors file, read and written by rows.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tables.safetensors"
    >>> file = TableFile.create(path, {"items": (3, 2)})
    >>> file.write("items", 1, torch.ones(2, 2))
    >>> file.rows("items").tolist()
    [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TableFile:
        """Write a file of zeros, its room on the disk taken; raises OSError where that is full."""
        entries, end = {}, 0
        for name, shape in shapes.items():
            size = ITEM_BYTES * math.prod(shape)
            span = [end, end + size]
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": span}
            end += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with path.open("wb") as file:
            file.write(LENGTH.pack(len(header)) + header)
            file.flush()
            if end:
                os.posix_fallocate(file.fileno(), file.tell(), end)
        return cls(path)

    @cached_property
    def header(self) -> tuple[dict[str, Any], int]:
        """Each tensor's entry by name, and where their bytes begin."""
        with self.path.open("rb") as file:
            size = LENGTH.unpack(file.read(LENGTH.size))[0]
            return json.loads(file.read(size)), LENGTH.size + size

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name."""
        return {name: tuple(entry["shape"]) for name, entry in self.header[0].items()}

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Put rows in the place of those from `first` on, and see them on the disk."""
        data = rows.detach().cpu().float().contiguous().numpy().data.cast("B")
        at = self._place(name) + first * ITEM_BYTES * math.prod(rows.shape[1:])
        with self.path.open("rb+", buffering=0) as file:
            while data:
                written = os.pwrite(file.fileno(), data, at)
                data, at = data[written:], at + written
            os.fsync(file.fileno())

    def rows(self, name: str) -> Tensor:
        """Return a tensor mapped from the file: read as it is used, and not to be written to."""
        if not self.path.is_file():
            raise InputError(f"{self.path} is missing; copy it from where the run was trained")
        at, shape = self._place(name), self.shapes[name]
        mapped = np.memmap(self.path, np.float32, mode="r", offset=at, shape=shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(mapped)

    def _place(self, name: str) -> int:
        entries, start = self.header
        return int(start + entries[name]["data_offsets"][0])


def read_tables(tables: Mapping[str, ShardedTable], path: Path) -> None:
    """Let tables answer from a file of a training; needs no TorchRec."""
    file = TableFile(path)
    for name, table in tables.items():
        table.read(file.rows(name))
