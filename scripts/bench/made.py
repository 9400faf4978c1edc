"""Made-up sequences of one length over a catalogue of skewed popularity."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.protocol import Sequences

HELD = 3
"""Events of a user beyond the positions: validation, test, and the last position's target."""


def sequences(users: int, items: int, length: int, seed: int = 0) -> Sequences:
    """Return `users` sequences that give `length` training positions each.

    The share of the item at place r of the popularity order is about 1 / r; every item occurs, so
    that the catalogue has its full size.
    """
    rng = np.random.default_rng(seed)
    events = users * (length + HELD)
    if events < items:
        raise ValueError(f"{events:,} events cannot hold {items:,} items; give more steps")
    share = np.cumsum(1 / np.arange(1, items + 1))
    drawn = np.searchsorted(share, rng.random(events) * share[-1]) + 1
    drawn[rng.permutation(events)[:items]] = np.arange(1, items + 1)
    names = np.arange(1, max(users, items) + 1).astype(str)
    offsets = np.arange(users + 1) * (length + HELD)
    return Sequences(drawn.astype(np.int64), offsets, names[:users], names[:items])


def write(made: Sequences, file: Path) -> None:
    """Write the input of `recsys prepare data=sequences`: `user item item …` a line."""
    with file.open("w") as lines:
        for user, path in zip(made.user_ids, made.lists(held=0), strict=True):
            lines.write(" ".join([str(user), *map(str, path.tolist())]) + "\n")
