"""What a person can set about recommending to everyone, checked when it is set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from recsys.schema import InputError
from recsys.serving.settings import _set

LIMITS = {"part_users": (1, 10_000_000), "batch": (1, 4_096), "threads": (1, 256)}
"""Smallest and largest value of each number."""


class Shard(NamedTuple):
    """Which of several processes this one is: it writes every `world`th part, from `rank` on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Read `i/n`, i from 0; where nothing is given, RANK and WORLD_SIZE, as torchrun sets them.

        >>> Shard.of("1/4"), Shard.of("", {"RANK": "2", "WORLD_SIZE": "3"}), Shard.of("", {})
        (Shard(rank=1, world=4), Shard(rank=2, world=3), Shard(rank=0, world=1))
        """
        said = text or f"{environment.get('RANK', 0)}/{environment.get('WORLD_SIZE', 1)}"
        match = re.fullmatch(r"(\d+)/(\d+)", said)
        if match is None or not int(match[1]) < int(match[2]):
            where = "shard" if text else "RANK/WORLD_SIZE"
            raise InputError(f"{where}={said!r}: expected i/n, i from 0 to n - 1, such as 0/4")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class BatchSettings:
    """How to recommend to everyone; each field is a flag of `recsys recommend`, with its text.

    >>> BatchSettings(batch=0)
    Traceback (most recent call last):
    recsys.schema.InputError: batch=0 is out of range; expected 1 to 4096
    """

    out: str = _set("", "folder of the parts; default: recommendations/BUNDLE in the workspace")
    dataset: str = _set("", "answer the users of this dataset; default: those of the bundle")
    users: str = _set("", "only the users in this file: an id a line, or Parquet with user_id")
    skip_unknown: bool = _set(
        False, "leave out users in the file who are not known; else they get popular items"
    )
    rank: bool | None = _set(None, "use the second stage; default: where the bundle has one")
    exact: bool = _set(False, "compare with every item, in place of the bundle's index")
    part_users: int = _set(20_000, "users of a part")
    batch: int = _set(256, "users that are encoded and searched together")
    threads: int = _set(2, "parts at work at a time, each on one core")
    shard: str = _set("", "i/n: write every nth part; default: RANK/WORLD_SIZE where they are set")
    finish: bool = _set(False, "write the manifest alone, where all parts are there")

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}={value} is out of range; expected {low} to {high}")
        if self.skip_unknown and not self.users:
            raise InputError("skip_unknown has no effect without a file of users: --users FILE")
        Shard.of(self.shard)
