"""Which users and items are seen often enough, over all days, and the events that wait for that.

An event waits until its item has `min_item_events` events and its user `min_user_events` of such
items; then all that waited for it come in, at their own times. Who is in stays in.

Shapes: E candidate events, C ids of a day (codes), in the order of the ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.schema import EVENT_TYPES

if TYPE_CHECKING:
    import ibis

Ints = NDArray[np.int64]

PENDING = "pending.parquet"
"""Events that wait, in a dataset's folder: as a source gives them, in the order they came."""
SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "timestamp": pa.int64(),
        "event_type": pa.string(),
        "value": pa.float32(),
    }
)


class Newcomers(NamedTuple):
    """Codes of ids that come in, the busiest first, and which candidate events do: bool [E]."""

    users: Ints
    items: Ints
    events: NDArray[np.bool_]


def admitted(
    users_E: Ints,
    items_E: Ints,
    known_users_C: NDArray[np.bool_],
    known_items_C: NDArray[np.bool_],
    least: tuple[int, int],
) -> Newcomers:
    """Return who comes in; `least` is how many events a user and an item need.

    Candidates are all events that are not in the dataset, each once: a day's and those that waited.

    >>> known = np.array([True, False])
    >>> admitted(np.array([0, 1, 1]), np.array([1, 1, 0]), known, known, (2, 2)).events.tolist()
    [True, True, True]
    """
    item_counts = np.bincount(items_E, minlength=len(known_items_C))
    item_in = known_items_C | (item_counts >= least[1])
    of_items = item_in[items_E]
    user_counts = np.bincount(users_E[of_items], minlength=len(known_users_C))
    user_in = known_users_C | (user_counts >= least[0])
    events = of_items & user_in[users_E]
    return Newcomers(
        _busiest(users_E[events], known_users_C), _busiest(items_E[events], known_items_C), events
    )


def _busiest(codes_E: Ints, known_C: NDArray[np.bool_]) -> Ints:
    """Return codes that are not known, most events first, equal ones in the order of their ids."""
    counts_C = np.bincount(codes_E, minlength=len(known_C))
    new = np.flatnonzero((counts_C > 0) & ~known_C)
    return new[np.argsort(-counts_C[new], kind="stable")]


def waiting(events: ibis.Table, users: ibis.Table, items: ibis.Table) -> ibis.Table:
    """Return coded events (see `prepare.Coded`) with their ids, as `PENDING` holds them."""
    types = [(code, name) for code, name in enumerate(EVENT_TYPES, start=1)]
    named = events.mutate(event_type=events.type.cases(*types))
    return named.join(users, "user").join(items, "item").order_by("row").select(*SCHEMA.names)
