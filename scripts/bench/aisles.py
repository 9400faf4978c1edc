"""A made-up catalogue of any size: items in aisles, people who stay in one, vectors that tell it.

Shapes: N items, D dim, E events. Items are numbered from 1, aisle by aisle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

AISLE = 250
"""Items of an aisle; 40 aisles make a department."""
DEPARTMENT = 40 * AISLE
OWN, POPULAR = 45, 8
"""Events of a person: items that nobody else looked at, so that all occur, and popular ones."""
START, HOUR = 1_700_000_000, 3_600


def write_events(items: int, file: Path, seed: int = 0) -> int:
    """Write a log in which every item occurs; return its number of events."""
    rng = np.random.default_rng(seed)
    people = -(-items // OWN)
    own = np.minimum(np.arange(people * OWN).reshape(people, OWN), items - 1)
    aisles = own[:, :1] // AISLE * AISLE
    popular = aisles + np.minimum(rng.geometric(0.1, (people, POPULAR)), AISLE) - 1
    path = rng.permuted(np.concatenate([own, np.minimum(popular, items - 1)], axis=1), axis=1)
    users = np.repeat(np.arange(people), path.shape[1])
    times = START + np.arange(path.size) % path.shape[1] * HOUR + users
    columns = {
        "user_id": pa.array(users).cast(pa.string()),
        "item_id": pa.array(path.ravel() + 1).cast(pa.string()),
        "timestamp": pa.array(times),
    }
    pq.write_table(pa.table(columns), file)
    return int(path.size)


def vectors(numbers_N: NDArray[np.int64], dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Return vectors by item number: a department's, its aisle's, and the item's own part.

    float32 [N, D], of standard deviation 0.02, as vectors start at random.
    """
    rng = np.random.default_rng(seed)
    last = int(numbers_N.max()) - 1
    parts = [
        rng.normal(size=(last // size + 1, dim)).astype(np.float32) for size in (DEPARTMENT, AISLE)
    ]
    places = numbers_N - 1
    vectors_ND = rng.normal(size=(len(places), dim)).astype(np.float32)
    vectors_ND *= 0.6
    vectors_ND += parts[0][places // DEPARTMENT]
    vectors_ND += parts[1][places // AISLE]
    vectors_ND *= np.float32(0.02 / vectors_ND.std())
    return vectors_ND
