"""From requests to answers on one bundle: read the history, encode, search, name the items.

Shapes: B requests that have a history, H interests, D dim, K answers.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.history import OWN_RECENCY, Histories, encode
from recsys.index.bundle import Bundle
from recsys.index.search import ItemIndex
from recsys.schema import EVENT_TYPES, PAD, InputError
from recsys.serving.catalogue import NONE, Catalogue, Filter, Indices
from recsys.serving.messages import (
    Answer,
    HistoryEvent,
    Ignored,
    ItemAnswer,
    RecommendRequest,
    SimilarAnswer,
    milliseconds,
)

if TYPE_CHECKING:
    import onnxruntime

NAMED_UNKNOWN = 5
"""So many unknown items are named in an answer; the rest are counted."""
ENCODED = (
    *("items", "types", "gaps", "times", "lengths", "recency"),
    *("request_gap", "request_hour", "request_weekday", "users"),
)
"""Arrays that a server can give an encoder: those of `history.encode`, and `users`."""
TYPE_CODES = {name: code for code, name in enumerate(EVENT_TYPES, 1)}


class UnknownItem(InputError):
    """An item id that the bundle does not hold."""


class Trajectory(NamedTuple):
    """Events of one user, oldest first: item indices, type codes, milliseconds."""

    items: NDArray[np.integer]
    types: NDArray[np.integer]
    times: NDArray[np.int64]

    def last(self, count: int) -> Trajectory:
        """Return the newest `count` events."""
        return Trajectory(self.items[-count:], self.types[-count:], self.times[-count:])


EMPTY = Trajectory(NONE, NONE, NONE)


@dataclass(frozen=True, slots=True)
class Reading:
    """One request resolved against a bundle: indices in place of ids, nothing left to look up.

    `path` is cut to what the encoder reads; `excluded` holds item indices never to answer with;
    `user` is the user's row plus one, 0 where unknown; `now` is in milliseconds; `recency` is the
    share of the newest turn, `OWN_RECENCY` where the model weighs it.
    """

    path: Trajectory
    excluded: Indices
    filter: Filter
    user: int
    now: int
    recency: float
    k: int
    group: tuple[object, ...]
    ignored: Ignored | None


class Stopwatch:
    """Milliseconds of each stage, one after the other."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.since = time.perf_counter_ns()

    def lap(self, stage: str) -> None:
        """End the stage `stage`; the next one begins."""
        now = time.perf_counter_ns()
        self.stages[stage] = round((now - self.since) / 1e6, 3)
        self.since = now


class Engine:
    """One loaded bundle that answers; safe to call from several threads at once."""

    def __init__(
        self, bundle: Bundle, session: onnxruntime.InferenceSession, index: ItemIndex
    ) -> None:
        self.bundle = bundle
        self.session = session
        self.search_index = index
        self.catalogue = Catalogue(bundle)
        self.users = bundle.users
        self.version = bundle.version
        self.max_length = bundle.max_length
        self.inputs = bundle.encoder_inputs
        self.has_time = bundle.has_time
        # Plain arrays over the mapped pages: slicing a numpy.memmap costs five times as much.
        self.events = {name: np.asarray(array) for name, array in bundle.events.items()}
        self.norms = np.maximum(np.linalg.norm(bundle.vectors_ND, axis=1), 1e-12)

    @classmethod
    def load(cls, path: Path | str, *, threads: int = 1, verify: bool = True) -> Engine:
        """Open, verify and warm the bundle at `path`; each encoder call uses `threads` cores.

        Raises InputError where the bundle is damaged, or its encoder reads something unknown.
        """
        bundle = Bundle.open(path, verify=verify)
        session = _session(bundle, threads)
        index = ItemIndex.load(bundle.index_path, bundle.vectors_ND, bundle.manifest["index"])
        engine = cls(bundle, session, index)
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Answer the shortest and the longest history once, so that no user waits for it."""
        ids: list[str | HistoryEvent] = [*self.catalogue.ids[1:]]
        for length in (1, self.max_length):
            self.recommend([RecommendRequest(history=(ids * length)[:length])])

    def recommend(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Answer each request; a batch gives the same items as one request at a time.

        Raises InputError where a request cannot be answered with this bundle.
        """
        watch = Stopwatch()
        readings = [self._read(request) for request in requests]
        modelled = [row for row, reading in enumerate(readings) if len(reading.path.items)]
        watch.lap("history")
        queries_BHD = self._encode([readings[row] for row in modelled])
        watch.lap("encode")
        found = self._search(queries_BHD, readings, modelled)
        watch.lap("search")
        items = [
            self.catalogue.recommended(*(found.get(row) or self._popular(reading)))
            for row, reading in enumerate(readings)
        ]
        watch.lap("answer")
        return [
            Answer(
                items=shown,
                source="model" if row in found else "popular",
                bundle=self.version,
                timings_ms=watch.stages,
                history_used=len(reading.path.items),
                ignored=reading.ignored,
            )
            for row, (shown, reading) in enumerate(zip(items, readings, strict=True))
        ]

    def similar(self, item_id: str, k: int = 10) -> SimilarAnswer:
        """Return the `k` items whose vectors point most nearly the same way; scores are cosines.

        Compared exactly against all items. Raises UnknownItem.
        """
        watch = Stopwatch()
        row = self._known(item_id) - 1
        vectors_ND = self.bundle.vectors_ND
        cosines_N = vectors_ND @ vectors_ND[row] / (self.norms * self.norms[row])
        cosines_N[row] = -np.inf
        best = _top(cosines_N, min(k, len(cosines_N) - 1))
        watch.lap("search")
        items = self.catalogue.recommended((best + 1).tolist(), cosines_N[best].tolist())
        watch.lap("answer")
        return SimilarAnswer(item_id, items, self.version, watch.stages)

    def item(self, item_id: str) -> ItemAnswer:
        """Return what the bundle knows about an item; raise UnknownItem."""
        index = self._known(item_id)
        count = int(self.catalogue.counts[index])
        return ItemAnswer(item_id, count, self.catalogue.features(index), self.version)

    def _known(self, item_id: str) -> int:
        index = self.catalogue.index.get(item_id)
        if index is None:
            raise UnknownItem(f"bundle {self.version} has no item {item_id[:100]!r}")
        return index

    def _read(self, request: RecommendRequest) -> Reading:
        now = int(time.time() * 1000) if request.now is None else milliseconds(request.now)
        row = self.users.get(request.user_id) if request.user_id is not None else None
        unknown: list[str] = []
        if request.history:
            path = self._given(request.history, now, unknown)
        else:
            path = EMPTY if row is None else self._stored(row)
        if not self.has_time and len(path.times):
            now = int(path.times[-1]) + 1
        chosen = self.catalogue.filter(request.allow_categories, request.deny_categories)
        excluded = self._indices(request.exclude_items, unknown)
        return Reading(
            path=path.last(self.max_length),
            excluded=np.append(path.items, excluded) if request.exclude_seen else excluded,
            filter=chosen,
            user=0 if row is None else row + 1,
            now=now,
            recency=self._recency(request),
            k=request.k,
            group=_group(request),
            ignored=_ignored(unknown, chosen.unknown),
        )

    def _recency(self, request: RecommendRequest) -> float:
        recency = request.weights.recency
        if recency is None:
            return OWN_RECENCY
        if "recency" not in self.inputs:
            raise InputError(
                f"weights.recency: {recency:g} has no effect on bundle {self.version}: its encoder "
                f"reads {', '.join(self.inputs)}, expected recency among them; leave it out, or "
                "train with model=trajectory model.blend=true and export again"
            )
        return recency

    def _indices(self, item_ids: Sequence[str], unknown: list[str]) -> Indices:
        """Return the indices of known items; the others are added to `unknown`."""
        index = self.catalogue.index
        unknown += [item_id for item_id in item_ids if item_id not in index]
        return np.array([index[i] for i in item_ids if i in index], np.int64)

    def _stored(self, row: int) -> Trajectory:
        start, end = self.events["offsets"][row : row + 2]
        return Trajectory(*(self.events[name][start:end] for name in ("items", "types", "times")))

    def _given(
        self, history: Sequence[str | HistoryEvent], now: int, unknown: list[str]
    ) -> Trajectory:
        events = [HistoryEvent(event) if isinstance(event, str) else event for event in history]
        index = self.catalogue.index
        known = [event for event in events if event.item_id in index]
        unknown += [event.item_id for event in events if event.item_id not in index]
        items = np.array([index[event.item_id] for event in known], np.int64)
        types = np.array([TYPE_CODES[event.event_type] for event in known], np.int64)
        times = event_times(known, now)
        order = np.argsort(times, kind="stable")
        places = np.arange(len(known), dtype=np.int64)
        return Trajectory(items[order], types[order], times[order] if self.has_time else places)

    def _encode(self, readings: Sequence[Reading]) -> NDArray[np.float32]:
        if not readings:
            return np.zeros((0, 1, 1), np.float32)
        histories = Histories.of([reading.path for reading in readings])
        now = np.array([reading.now for reading in readings], np.int64)
        recency = np.array([reading.recency for reading in readings], np.float32)
        arrays = encode(histories, self.max_length, now, recency)
        arrays["users"] = np.array([reading.user for reading in readings], np.int64)
        queries_BHD = self.session.run(["queries"], {name: arrays[name] for name in self.inputs})[0]
        return np.asarray(queries_BHD, np.float32)

    def _search(
        self, queries_BHD: NDArray[np.float32], readings: Sequence[Reading], rows: Sequence[int]
    ) -> dict[int, tuple[list[int], list[float]]]:
        """Return item indices and scores by row; requests with one filter and k go together."""
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            groups[readings[row].group].append(place)
        found = {}
        for places in groups.values():
            members = [readings[rows[place]] for place in places]
            indices_BK, scores_BK = self.search_index.search(
                queries_BHD[places],
                members[0].k,
                excluded=[reading.excluded for reading in members],
                allowed=members[0].filter.allowed,
            )
            for place, indices, scores in zip(places, indices_BK, scores_BK, strict=True):
                real = indices != PAD
                found[rows[place]] = (indices[real].tolist(), scores[real].tolist())
        return found

    def _popular(self, reading: Reading) -> tuple[list[int], list[float]]:
        indices = self.catalogue.popular(reading.k, reading.excluded, reading.filter.allowed)
        return indices.tolist(), self.catalogue.counts[indices].astype(float).tolist()


def event_times(events: Sequence[HistoryEvent], now: int) -> Indices:
    """Return each event's milliseconds; one without a time happened with the one before it.

    Those before the first known time happened with it; where no time is known, all happened now.

    >>> events = [HistoryEvent("a"), HistoryEvent("b", timestamp=5), HistoryEvent("c")]
    >>> event_times(events, now=9000)
    array([5000, 5000, 5000])
    """
    given = [-1 if event.timestamp is None else milliseconds(event.timestamp) for event in events]
    times = np.array(given, np.int64)
    known = np.flatnonzero(times >= 0)
    if not len(known):
        return np.full(len(times), now, np.int64)
    before = np.searchsorted(known, np.arange(len(times)), side="right") - 1
    return times[known[np.maximum(before, 0)]]


def use_one_core() -> None:
    """Keep FAISS calls of this thread on one core; several requests then share the machine."""
    import faiss

    faiss.omp_set_num_threads(1)


def _session(bundle: Bundle, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    unknown = [name for name in bundle.encoder_inputs if name not in ENCODED]
    if unknown:
        raise InputError(
            f"{bundle.path}: its encoder reads {', '.join(unknown)}, unknown to this recsys; "
            f"known are {', '.join(ENCODED)}; export it again with this version"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            bundle.encoder_path, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions share no public base
        raise InputError(f"{bundle.encoder_path}: not a readable ONNX graph: {error}") from error


def _group(request: RecommendRequest) -> tuple[object, ...]:
    allow = request.allow_categories
    return request.k, None if allow is None else tuple(allow), tuple(request.deny_categories)


def _ignored(items: list[str], categories: list[str]) -> Ignored | None:
    if not items and not categories:
        return None
    return Ignored(len(items), list(dict.fromkeys(items))[:NAMED_UNKNOWN], categories)


def _top(values_N: NDArray[np.floating], k: int) -> Indices:
    best = np.argpartition(-values_N, k - 1)[:k] if k else NONE
    return best[np.lexsort((best, -values_N[best]))]
