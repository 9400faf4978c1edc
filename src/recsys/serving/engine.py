"""From requests to answers on one bundle: read the history, encode, search, rank, apply rules.

Shapes: B requests that have a history, H interests, D dim, C candidates, K answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from recsys.history import OWN_RECENCY, Arrays, Histories, encode
from recsys.index.bundle import Bundle
from recsys.index.search import Hits, ItemIndex
from recsys.schema import InputError
from recsys.serving.catalogue import NONE, Catalogue, Filter, Indices, Kept
from recsys.serving.graphs import ENCODED, check_inputs, open_graph
from recsys.serving.messages import (
    Answer,
    Ignored,
    ItemAnswer,
    RecommendRequest,
    SimilarAnswer,
    milliseconds,
)
from recsys.serving.paths import EMPTY, Trajectory, event_times, given, joined, since, stored
from recsys.serving.ranking import Ranker
from recsys.serving.rules import (
    NO_RULES,
    WIDER,
    Boost,
    Rules,
    boosted,
    capped,
    in_order,
    rules_of,
    until_enough,
)

if TYPE_CHECKING:
    import onnxruntime

    from recsys.serving.state import UserPath

__all__ = ["Engine", "UnknownItem", "event_times", "use_one_core"]

NAMED_UNKNOWN = 5
"""So many unknown items are named in an answer; the rest are counted."""
BOOST_BYTES = 16 << 20
"""Boosts resolved for earlier requests may take this much memory."""

Arm = Literal["champion", "challenger"]
Queries = NDArray[np.float32]


class UnknownItem(InputError):
    """An item id that the bundle does not hold."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One request resolved against a bundle: indices in place of ids, nothing left to look up.

    `path` is cut to what the encoder reads; `out` holds item indices never to answer with; `user`
    is the user's row plus one, 0 where unknown; `now` is in milliseconds; `recency` is the share
    of the newest turn, `OWN_RECENCY` where the model weighs it.
    """

    path: Trajectory
    out: set[int]
    filter: Filter
    rules: Rules
    user: int
    now: int
    recency: float
    k: int
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
        self,
        bundle: Bundle,
        session: onnxruntime.InferenceSession,
        index: ItemIndex,
        ranker: Ranker | None = None,
    ) -> None:
        self.bundle = bundle
        self.session = session
        self.search_index = index
        self.ranker = ranker
        self.catalogue = Catalogue(bundle, index)
        self.boosts: Kept[Boost] = Kept(BOOST_BYTES)
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
        """Open, verify and warm the bundle at `path`; each graph's call uses `threads` cores.

        Raises InputError where the bundle is damaged, or a graph of it reads something unknown.
        """
        bundle = Bundle.open(path, verify=verify)
        check_inputs(bundle.encoder_path, bundle.encoder_inputs, ENCODED)
        session = open_graph(bundle.encoder_path, threads)
        index = ItemIndex.load(bundle.index_path, bundle.vectors_ND, bundle.manifest["index"])
        engine = cls(bundle, session, index, Ranker.load(bundle, threads))
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Answer the shortest and the longest history once, so that no user waits for it."""
        for length in (1, self.max_length):
            ids = islice(cycle(self.catalogue.ids[1 : length + 1]), length)
            self.recommend([RecommendRequest(history=[*ids])])

    def recommend(
        self,
        requests: Sequence[RecommendRequest],
        paths: Sequence[UserPath | None] | None = None,
        answer_ids: Sequence[str] | None = None,
        arm: Arm = "champion",
    ) -> list[Answer]:
        """Answer each request; a batch gives the same items as one request at a time.

        paths: what each request's user did since the bundle was made, None where nothing is known;
        a request with a history of its own leaves it aside. answer_ids and arm go into the answers.
        Raises InputError where a request cannot be answered with this bundle.
        """
        watch = Stopwatch()
        given_paths = paths or [None] * len(requests)
        readings = [self._read(*pair) for pair in zip(requests, given_paths, strict=True)]
        modelled = [row for row, reading in enumerate(readings) if len(reading.path.items)]
        watch.lap("history")
        chosen = self._modelled([readings[row] for row in modelled], watch)
        found = dict(zip(modelled, chosen, strict=True))
        hits = [
            found[row] if row in found else self._popular(reading)
            for row, reading in enumerate(readings)
        ]
        items = [self.catalogue.recommended(*hit) for hit in hits]
        watch.lap("answer")
        return [
            Answer(
                items=items[row],
                source="model" if row in found else "popular",
                bundle=self.version,
                timings_ms=watch.stages,
                history_used=len(reading.path.items),
                ignored=reading.ignored,
                answer_id=answer_ids[row] if answer_ids else "",
                arm=arm,
            )
            for row, reading in enumerate(readings)
        ]

    def popular(self, request: RecommendRequest, path: UserPath | None = None) -> Answer:
        """Answer with popular items whatever the history, by the request's filters and rules.

        For when the model cannot answer in time: some tens of microseconds, and no graph is run.
        """
        watch = Stopwatch()
        reading = self._read(request, path)
        items = self.catalogue.recommended(*self._popular(reading))
        watch.lap("answer")
        return Answer(items, "popular", self.version, watch.stages, ignored=reading.ignored)

    def stored_events(self, user_id: str, erased_before: int = 0) -> int:
        """Return how many events of a user the bundle holds that an erasure has not undone."""
        row = self.users.get(user_id)
        if row is None:
            return 0
        return len(since(stored(self.events, row), erased_before, self.has_time).items)

    def similar(self, item_id: str, k: int = 10) -> SimilarAnswer:
        """Return the `k` items whose vectors point most nearly the same way; scores are cosines.

        Compared exactly against all items. Raises UnknownItem.
        """
        watch = Stopwatch()
        row = self._known(item_id) - 1
        vector_1D = self.bundle.vectors_ND[row : row + 1]
        cosines_N = self.search_index.score_all(vector_1D)[1:] / (self.norms * self.norms[row])
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

    def _read(self, request: RecommendRequest, live: UserPath | None = None) -> Reading:
        now = int(time.time() * 1000) if request.now is None else milliseconds(request.now)
        unknown: list[str] = []
        user, path = self._path(request, live, now, unknown)
        if not self.has_time and len(path.times):
            now = int(path.times[-1]) + 1
        out = set(path.items.tolist()) if request.exclude_seen else set()
        if request.exclude_items:
            out.update(self._indices(request.exclude_items, unknown))
        chosen = self.catalogue.filter(request.allow_categories, request.deny_categories)
        rules = rules_of(request, self.catalogue, self.boosts)
        return Reading(
            path=path.last(self.max_length),
            out=out,
            filter=chosen,
            rules=rules,
            user=user,
            now=now,
            recency=self._recency(request),
            k=request.k,
            ignored=_ignored(unknown, chosen, rules),
        )

    def _path(
        self, request: RecommendRequest, live: UserPath | None, now: int, unknown: list[str]
    ) -> tuple[int, Trajectory]:
        """Return the user's row plus one, 0 for none, and the path to answer from."""
        row = self.users.get(request.user_id) if request.user_id is not None else None
        user, path = (0, EMPTY) if row is None else (row + 1, stored(self.events, row))
        if live is not None and live.erased_before:
            kept = since(path, live.erased_before, self.has_time)
            # What a model learnt of a person by id goes with the events that it learnt it from.
            user, path = user if len(kept.items) == len(path.items) else 0, kept
        index = self.catalogue.index
        if request.history:
            return user, given(request.history, now, index, self.has_time, unknown)
        return user, path if live is None else joined(path, live, index, self.has_time)

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

    def _indices(self, item_ids: Sequence[str], unknown: list[str]) -> list[int]:
        """Return the indices of known items; the others are added to `unknown`."""
        index = self.catalogue.index
        unknown += [item_id for item_id in item_ids if item_id not in index]
        return [index[item_id] for item_id in item_ids if item_id in index]

    def _modelled(self, readings: Sequence[Reading], watch: Stopwatch) -> list[Hits]:
        """Encode, search, and where the bundle has a ranker, rank."""
        arrays = self._arrays(readings)
        queries_BHD = self._encode(arrays, len(readings))
        watch.lap("encode")
        first = self._search(queries_BHD, readings)
        sources = [
            Retrieved(reading, self.search_index, queries_HD, hits, self._width(reading))
            for reading, queries_HD, hits in zip(readings, queries_BHD, first, strict=True)
        ]
        if self.ranker is None:
            found = [self._ruled(source) for source in sources]
            watch.lap("search")
            return found
        watch.lap("search")
        found = [
            self._ranked(self.ranker, source, _row(arrays, row, self.ranker.inputs))
            for row, source in enumerate(sources)
        ]
        watch.lap("rank")
        return found

    def _arrays(self, readings: Sequence[Reading]) -> Arrays:
        """Return everything that a graph may read of the requests."""
        if not readings:
            return {}
        histories = Histories.of([reading.path for reading in readings])
        now = np.array([reading.now for reading in readings], np.int64)
        recency = np.array([reading.recency for reading in readings], np.float32)
        users = np.array([reading.user for reading in readings], np.int64)
        return encode(histories, self.max_length, now, recency) | {"users": users}

    def _encode(self, arrays: Arrays, batch: int) -> Queries:
        if not batch:
            return np.zeros((0, 1, 1), np.float32)
        queries_BHD = self.session.run(["queries"], {name: arrays[name] for name in self.inputs})[0]
        return np.asarray(queries_BHD, np.float32)

    def _search(self, queries_BHD: Queries, readings: Sequence[Reading]) -> list[Hits]:
        """Return each request's best items; those with one filter and width go together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, reading in enumerate(readings):
            groups.setdefault((self._width(reading), id(reading.filter.subset)), []).append(row)
        found: dict[int, Hits] = {}
        for (width, _), rows in groups.items():
            outs, subset = [readings[row].out for row in rows], readings[rows[0]].filter.subset
            hits = self.search_index.nearest(queries_BHD[rows], width, outs, subset)
            found.update(zip(rows, hits, strict=True))
        return [found[row] for row in range(len(readings))]

    def _width(self, reading: Reading) -> int:
        """Return how many items to search for first: a cap or a ranker chooses among more."""
        width = reading.k if reading.rules.cap is None else WIDER * reading.k
        return width if self.ranker is None else max(width, self.ranker.candidates)

    def _popular(self, reading: Reading) -> Hits:
        return self._ruled(Popular(reading, self.catalogue, self._width(reading)))

    def _ruled(self, source: Retrieved | Popular) -> Hits:
        """Return a source's best items by the request's rules."""
        reading, rules = source.reading, source.reading.rules
        if rules is NO_RULES:
            return source.best(reading.k)

        def attempt(width: int) -> tuple[Hits, bool]:
            hits, complete = boosted(source, rules.boost, width)
            return capped(hits, rules.cap, reading.k, self.catalogue.categories), complete

        return until_enough(source.width, reading.k, attempt)

    def _ranked(self, ranker: Ranker, source: Retrieved, arrays: Arrays) -> Hits:
        """Return what the ranker makes of a source's best items, by the request's rules."""
        reading, rules = source.reading, source.reading.rules

        def attempt(width: int) -> tuple[Hits, bool]:
            hits, complete = boosted(source, rules.boost, width)
            ranked = self._rescored(ranker, source, arrays, hits, width)
            return capped(ranked, rules.cap, reading.k, self.catalogue.categories), complete

        return until_enough(source.width, reading.k, attempt)

    def _rescored(
        self, ranker: Ranker, source: Retrieved, arrays: Arrays, hits: Hits, width: int
    ) -> Hits:
        """Order the first `width` hits, and items boosted by their ids, by the ranker's scores."""
        boost = source.reading.rules.boost
        items, scores = np.array(hits[0][:width], np.int64), np.array(hits[1][:width])
        if boost is not None:
            named = boost.named[source.eligible(boost.named)]
            items = np.concatenate([items, named[~np.isin(named, items)]])
            scores = source.score(items)
        if not len(items):
            return [], []
        vectors_CD = self.search_index.vectors_ND[items - 1]
        ranked = ranker.scores(arrays, source.queries_HD, items, vectors_CD, scores)
        return in_order(items, ranked if boost is None else ranked + boost.of(items))


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What the search finds for one request; its `first` `width` hits are there already."""

    reading: Reading
    index: ItemIndex
    queries_HD: Queries
    first: Hits
    width: int

    def best(self, width: int) -> Hits:
        """Return the best `width` items; fewer only where there are no more."""
        if width == self.width:
            return self.first
        reading, queries_BHD = self.reading, self.queries_HD[None]
        return self.index.nearest(queries_BHD, width, [reading.out], reading.filter.subset)[0]

    def score(self, indices: Indices) -> NDArray[np.floating]:
        """Return inner products with the queries."""
        return self.index.score(self.queries_HD, indices)

    def eligible(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items, in rising order, may be answered with."""
        return _eligible(self.reading, indices)


@dataclass(frozen=True, slots=True)
class Popular:
    """What is popular, for one request; scores are numbers of events."""

    reading: Reading
    catalogue: Catalogue
    width: int

    def best(self, width: int) -> Hits:
        """Return the `width` items with most events; fewer only where there are no more."""
        return self.catalogue.popular(width, self.reading.out, self.reading.filter)

    def score(self, indices: Indices) -> NDArray[np.floating]:
        """Return numbers of events."""
        return self.catalogue.counts[indices].astype(float)

    def eligible(self, indices: Indices) -> NDArray[np.bool_]:
        """Return which of some items, in rising order, may be answered with."""
        return _eligible(self.reading, indices)


def use_one_core() -> None:
    """Keep FAISS calls of this thread on one core; several requests then share the machine."""
    import faiss

    faiss.omp_set_num_threads(1)


def _row(arrays: Arrays, row: int, names: Sequence[str]) -> Arrays:
    """Return one request's arrays of some names, as if it had been encoded alone."""
    length = int(arrays["lengths"][row])
    chosen = {name: arrays[name] for name in names if name in arrays}
    return {n: v[[row], :length] if v.ndim == 2 else v[[row]] for n, v in chosen.items()}


def _eligible(reading: Reading, indices: Indices) -> NDArray[np.bool_]:
    subset, out = reading.filter.subset, np.fromiter(reading.out, np.int64, len(reading.out))
    allowed = np.ones(len(indices), bool) if subset is None else subset.holds(indices)
    places = np.searchsorted(indices, out)
    out, places = out[places < len(indices)], places[places < len(indices)]
    allowed[places[indices[places] == out]] = False
    return allowed


def _ignored(items: list[str], chosen: Filter, rules: Rules) -> Ignored | None:
    boost, categories = rules.boost, chosen.unknown
    if boost is not None:
        items, categories = items + boost.unknown_items, categories + boost.unknown_categories
    if not items and not categories:
        return None
    return Ignored(len(items), list(dict.fromkeys(items))[:NAMED_UNKNOWN], categories)


def _top(values_N: NDArray[np.floating], k: int) -> Indices:
    best = np.argpartition(-values_N, k - 1)[:k] if k else NONE
    return best[np.lexsort((best, -values_N[best]))]
