"""What every side of the training benchmark shares: data, split, sizes, clock, quality. Numpy only.

Each library's driver runs in that library's own environment and imports this file alone.
Shapes: U users, E events, Q tested users, K places of a top list.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP = 10
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """What one driver is asked for; the sizes are the same for all."""

    data: str
    folder: str
    length: int
    dropout: float
    seconds: float
    points: int = 1
    loss: str = "full_softmax"
    batch: int = 128
    dim: int = 64
    layers: int = 2
    heads: int = 2
    feedforward: int = 64
    lr: float = 1e-3
    negatives: int = 256
    threads: int = 2
    seed: int = 1
    accelerator: str = "cpu"
    precision: str = "32-true"
    ours: tuple[str, ...] = ()

    @classmethod
    def given(cls) -> Settings:
        """Read the JSON that the benchmark passes as the only argument."""
        return cls(**json.loads(sys.argv[1]))

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Sequences:
    """Users' items, oldest first. Items are codes 1 to N, users rows 0 to U - 1."""

    items: Ints
    offsets: Ints
    user_ids: NDArray[np.str_]
    item_ids: NDArray[np.str_]

    @classmethod
    def read(cls, file: Path, has_users: bool) -> Sequences:
        """Read lines of `user item item …`, or of items only: then the line number is the user."""
        packed = file.read_bytes()
        text = (gzip.decompress(packed) if file.suffix == ".gz" else packed).decode()
        numbered = enumerate(text.splitlines(), start=1)
        lines = [(str(number), line.split()) for number, line in numbered if line.strip()]
        users = [words[0] if has_users else number for number, words in lines]
        parts = [words[1:] if has_users else words for _, words in lines]
        item_ids, codes = np.unique(np.concatenate(parts), return_inverse=True)
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        return cls(codes.astype(np.int64) + 1, offsets, np.array(users), item_ids)

    @classmethod
    def load(cls, file: str) -> Sequences:
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**arrays)

    def save(self, file: Path) -> None:
        np.savez(file, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def lengths(self) -> Ints:
        """Events of each user: [U]."""
        return np.diff(self.offsets)

    @cached_property
    def tested(self) -> Ints:
        """Users whose last event is the test; under 3 events a user only trains: [Q]."""
        return np.flatnonzero(self.lengths >= 3)

    @cached_property
    def targets(self) -> Ints:
        return self.items[self.offsets[self.tested + 1] - 1]

    def ends(self, held: int) -> Ints:
        """Return how many events each user has without the last `held`: 2 train, 1 is before test.

        >>> Sequences(np.arange(6), np.array([0, 2, 6]), np.array([]), np.array([])).ends(2)
        array([2, 2])
        """
        return np.where(self.lengths >= 3, self.lengths - held, self.lengths)

    def flat(self, held: int) -> dict[str, Ints]:
        """Return users, items and places [E] of all events but the last `held` of each user."""
        ends = self.ends(held)
        users = np.repeat(np.arange(len(ends)), ends)
        places = np.arange(len(users)) - np.repeat(np.cumsum(ends) - ends, ends)
        return {"users": users, "items": self.items[self.offsets[users] + places], "places": places}

    def lists(self, held: int) -> list[Ints]:
        """Return the same as one array of items a user."""
        pairs = zip(self.offsets, self.ends(held), strict=False)
        return [self.items[start : start + count] for start, count in pairs]

    def positions(self, longest: int | None = None) -> int:
        """Return the targets of an epoch: every training event that has an earlier one.

        `longest` keeps each user's newest that many, as libraries that cut histories do.
        """
        targets = np.maximum(self.ends(2) - 1, 0)
        return int((targets if longest is None else np.minimum(targets, longest)).sum())


def quality(lists_QK: Ints, targets_Q: Ints) -> dict[str, float]:
    """Return R@K and NDCG@K of top lists of codes, 0 where a list is shorter.

    >>> quality(np.array([[4, 5], [6, 7], [0, 0]]), np.array([4, 7, 9]))["recall"]
    0.6666666666666666
    """
    hit_QK = lists_QK == targets_Q[:, None]
    gain_K = 1 / np.log2(np.arange(2, lists_QK.shape[1] + 2))
    return {"recall": float(hit_QK.any(1).mean()), "ndcg": float((hit_QK @ gain_K).mean())}


@dataclass
class Meter:
    """Counts targets against the clock, pausing it to rank the tested users `points` times.

    `rank` returns lists_QK in the order of `Sequences.tested`. The first step only warms up.
    """

    settings: Settings
    rank: Callable[[], Ints]
    now: Callable[[], float] = time.perf_counter
    began: float | None = None
    paused: float = 0.0
    seconds: float = 0.0
    positions: int = 0
    steps: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)

    def step(self, positions: int) -> bool:
        """Count one finished step; return whether there is time for another."""
        if self.began is None:
            self.began = self.now()
            return True
        self.seconds = self.now() - self.began - self.paused
        self.positions, self.steps = self.positions + positions, self.steps + 1
        if self.seconds >= self.settings.seconds * (len(self.points) + 1) / self.settings.points:
            self._pause()
        return self.seconds < self.settings.seconds

    def _pause(self) -> None:
        started = self.now()
        lists_QK = self.rank()
        spent = self.now() - started
        self.paused += spent
        file = Path(self.settings.folder) / f"lists-{len(self.points)}.npy"
        np.save(file, lists_QK)
        point = {"seconds": self.seconds, "rank_seconds": spent, "lists": str(file)}
        self.points.append(point)
        print(f"{self.seconds:.0f} s trained, ranked in {spent:.1f} s", file=sys.stderr, flush=True)

    def result(self, epoch_positions: int, **facts: Any) -> dict[str, Any]:
        """Return the figures of the row; an epoch that was not finished is extrapolated."""
        rate = self.positions / self.seconds
        return {
            "positions_per_second": rate,
            "epoch_positions": epoch_positions,
            "epoch_seconds": epoch_positions / rate,
            "epochs": self.positions / epoch_positions,
            "steps": self.steps,
            "peak_memory_gib": peak_memory_gib(),
            "rank_seconds": statistics.median(p["rank_seconds"] for p in self.points),
            "points": self.points,
            **facts,
        }


def peak_memory_gib() -> float:
    """Return the most memory this process has held, in GiB.

    Linux's own figure for the address space: getrusage's would begin at the parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def driver_environment(threads: int, *paths: Path, gpu: bool = False) -> dict[str, str]:
    """Return the environment of a driver: its threads, where else it imports from, and no GPU."""
    found = [str(path) for path in paths] + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    joined = os.pathsep.join(path for path in found if path)
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **wanted, "PYTHONPATH": joined, **hidden}
