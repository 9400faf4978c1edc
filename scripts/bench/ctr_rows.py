"""What every side of the ranking benchmark shares: prepared rows, sizes, clock. Numpy only.

Each library's driver runs in that library's own environment and imports this file and `protocol`.
Shapes: R rows, L history length, W genres of an item, N items.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
PARTS = ("train", "validation", "test")
PADDING, UNKNOWN = 0, 1
"""Codes that stand for nothing, and for what training rows do not hold; known values follow."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class CtrSettings:
    """What one driver is asked for; the same for all."""

    rows: str
    folder: str
    model: str
    embedding: int = 16
    batch: int = 1024
    lr: float = 1e-3
    patience: int = 2
    epochs: int = 30
    threads: int = 2
    seed: int = 1

    @classmethod
    def given(cls) -> CtrSettings:
        """Read the JSON that the benchmark passes as the only argument."""
        return cls(**json.loads(sys.argv[1]))

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class CtrRows:
    """Shown items in the order of time, coded by what the training rows hold.

    part: 0 train, 1 validation, 2 test. histories int32 [R, L]: the newest items strictly before,
    oldest first, from place 0 on; lengths how many; ratings int32 [R, L], codes of what was given
    to each. item_genres int32 [N + 2, W] by item code.
    """

    part: NDArray[np.int8]
    users: Ints
    items: Ints
    hours: Ints
    weekdays: Ints
    histories: NDArray[np.int32]
    lengths: Ints
    ratings: NDArray[np.int32]
    labels: NDArray[np.float32]
    item_genres: NDArray[np.int32]

    @classmethod
    def load(cls, file: str) -> CtrRows:
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**arrays)

    def save(self, file: Path) -> None:
        np.savez(file, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def sizes(self) -> dict[str, int]:
        """How many codes each field has, padding among them."""
        return {
            "user": int(self.users.max()) + 1,
            "item": len(self.item_genres),
            "genres": int(self.item_genres.max()) + 1,
            "ratings": int(self.ratings.max()) + 1,
            "hour": 24,
            "weekday": 7,
        }

    def columns(self, part: str) -> dict[str, NDArray[Any]]:
        """Return the columns of a part's rows: `genres` [R, W], `history`, `ratings` [R, L], …"""
        at = self.part == PARTS.index(part)
        return {
            "user": self.users[at],
            "item": self.items[at],
            "genres": self.item_genres[self.items[at]],
            "hour": self.hours[at],
            "weekday": self.weekdays[at],
            "history": self.histories[at],
            "length": self.lengths[at],
            "ratings": self.ratings[at],
            "label": self.labels[at],
        }


def coded(values_R: NDArray[Any], training_R: NDArray[np.bool_]) -> Ints:
    """Return codes of values: those of training rows from 2 on, others 1.

    >>> coded(np.array([7, 5, 9]), np.array([True, True, False]))
    array([3, 2, 1])
    """
    known = np.unique(values_R[training_R])
    place_R = np.minimum(np.searchsorted(known, values_R), len(known) - 1)
    return np.where(known[place_R] == values_R, place_R + 2, UNKNOWN)


@dataclass
class Clock:
    """Times a library's own `fit`, less what it spends on evaluation; counts what it trained."""

    now: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    aside: float = 0.0
    epochs: int = 0

    @contextmanager
    def training(self) -> Iterator[None]:
        began = self.now()
        yield
        self.seconds += self.now() - began

    def evaluation(self, evaluate: Callable[..., Made]) -> Callable[..., Made]:
        """Return the library's evaluation, its time set aside; each call ends an epoch."""

        def timed(*given: Any, **named: Any) -> Made:
            began = self.now()
            found = evaluate(*given, **named)
            self.aside += self.now() - began
            self.epochs += 1
            return found

        return timed

    def result(self, rows: CtrRows, predicted_R: NDArray[Any], settings: CtrSettings) -> str:
        """Keep the predictions of the test rows; return the figures as a line of JSON."""
        from protocol import peak_memory_gib  # a driver lies beside it

        count = int((rows.part == 0).sum()) * self.epochs
        file = Path(settings.folder) / "test.npy"
        np.save(file, np.asarray(predicted_R, np.float64).reshape(-1))
        facts = {
            "rows_per_second": count / (self.seconds - self.aside),
            "epochs": self.epochs,
            "train_seconds": self.seconds - self.aside,
            "evaluation_seconds": self.aside,
            "peak_memory_gib": peak_memory_gib(),
            "predictions": str(file),
        }
        return json.dumps({"model": settings.model, **facts})
