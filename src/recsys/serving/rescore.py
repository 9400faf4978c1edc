"""Score logged answers again, from the bundle and the log of events: both must say the same.

What a user had done when an answer was made is rebuilt from the events that had been received by
then. Which of those that came in the same moments had been read is not in any clock; the answer's
checksum of its path tells.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from recsys.schema import type_code
from recsys.serving import parts
from recsys.serving.engine import Engine
from recsys.serving.messages import Boosts, HistoryEvent, RecommendRequest, Weights, moment
from recsys.serving.state import UserPath, user_hash

SLACK = 60_000
"""An event that was received so many milliseconds before an answer was asked for has been read."""
Row = dict[str, Any]
HISTORY = msgspec.json.Decoder(list[str | HistoryEvent])
WEIGHTS = msgspec.json.Decoder(Weights)
BOOSTS = msgspec.json.Decoder(Boosts)


class Rescored(NamedTuple):
    """What came of it: answers and items scored again, the largest difference, and the others.

    Differences are in proportion to scores beyond 1.
    `left` counts answers that could not be: of another bundle, given without a model or its ranker,
    from before the log held enough, or of a path that cannot be rebuilt (erased, or not all here).
    """

    answers: int
    items: int
    largest: float
    left: dict[str, int]


def rescore(
    engine: Engine,
    log_dir: Path | str,
    *,
    max_events: int = 200,
    erased: Mapping[bytes, int] | None = None,
) -> Rescored:
    """Compare the scores in a server's log with those that `engine` gives the same items.

    max_events: as the server was set; erased: what its state has of erasures, by `user_hash`.
    """
    events = _events(Path(log_dir))
    left: Counter[str] = Counter()
    answers, items, largest = 0, 0, 0.0
    for answer in _rows(Path(log_dir), "answers"):
        if reason := _unfit(answer, engine.version):
            left[reason] += 1
            continue
        request, user = _request(answer), answer["user_id"]
        before = (erased or {}).get(user_hash(user), 0) if user else 0
        tried = _paths(answer, events[user], before, max_events)
        read = (path for path in tried if engine.checksum(request, path) == answer["path"])
        path = next(read, "none")
        if isinstance(path, str):
            left["path not rebuilt"] += 1
            continue
        scores = engine.scores(request, answer["items"], path)
        largest = max(largest, _difference(scores, answer["scores"]))
        answers, items = answers + 1, items + len(scores)
    return Rescored(answers, items, largest, dict(left))


def _difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest difference, in proportion where scores are beyond 1: the log has float32.

    >>> _difference([0.5, 2000.0], [0.25, 1000.0])
    0.5
    """
    size = np.maximum(np.abs(left), 1.0)
    return float((np.abs(np.subtract(left, right)) / size).max())


def _rows(log_dir: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of a log's files in the order in which they were written."""
    there = parts.files(log_dir / kind)
    for part in sorted(there, key=parts.last_row) if kind == "events" else there:
        for table in parts.read_part(part):
            yield from _plain(parts.of_schema(table, parts.KINDS[kind])).to_pylist()


def _plain(table: pa.Table) -> pa.Table:
    """Return a table with its moments as milliseconds."""
    moments = [f.name for f in table.schema if pa.types.is_timestamp(f.type)]
    for name in moments:
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(pa.int64()))
    return table


def _events(log_dir: Path) -> Mapping[str | None, list[Row]]:
    """Return each user's events in the order in which they were taken, each once."""
    found: defaultdict[str | None, dict[str, Row]] = defaultdict(dict)
    for event in _rows(log_dir, "events"):
        found[event["user_id"]].setdefault(event["event_id"], event)
    return defaultdict(list, {user: [*rows.values()] for user, rows in found.items()})


def _unfit(answer: Row, version: str) -> str | None:
    """Return why an answer cannot be scored again, None where it can."""
    if answer["bundle"] != version:
        return "other bundle"
    if answer["fallback"] or answer["source"] == "given":
        return "fallback"
    if answer["path"] is None:
        return "older log"
    return None if answer["items"] else "no items"


def _request(answer: Row) -> RecommendRequest:
    return RecommendRequest(
        user_id=answer["user_id"],
        history=HISTORY.decode(answer["history"]) if answer["history"] else None,
        now=moment(answer["now"]),
        context=msgspec.json.decode(answer["context"] or "{}"),
        weights=WEIGHTS.decode(answer["weights"] or "{}"),
        boosts=BOOSTS.decode(answer["boosts"] or "{}"),
        exclude_seen=False,
    )


def _paths(
    answer: Row, events: Sequence[Row], erased_before: int, max_events: int
) -> Iterator[UserPath | None]:
    """Yield what may have been read of a user, the likeliest, all received by then, first."""
    received = [event["received"] for event in events]
    most = 1 + max((n for n, at in enumerate(received) if at <= answer["time"]), default=-1)
    sure = answer["now"] - SLACK
    least = next((n for n, at in enumerate(received) if at >= sure), most)
    for count in range(most, min(least, most) - 1, -1):
        yield _path(events[:count], erased_before, max_events)


def _path(events: Sequence[Row], erased_before: int, max_events: int) -> UserPath:
    kept = [event for event in events if event["timestamp"] >= erased_before]
    newest = sorted(kept, key=lambda event: event["timestamp"])[-max_events:]
    return UserPath(
        [event["item_id"] for event in newest],
        [type_code(event["event_type"]) for event in newest],
        [event["timestamp"] for event in newest],
        [event["value"] for event in newest],
        erased_before,
    )
