"""From requests to answers on one bundle: read the history, encode, search, rank, apply rules.

Shapes: B requests that have a history, H interests, D dim, C candidates, K answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from recsys.history import OWN_RECENCY, Arrays, Histories, encode
from recsys.index.bundle import ENCODER, Bundle
from recsys.index.search import NOTHING, Hits, ItemIndex
from recsys.schema import InputError
from recsys.serving.arranging import WITHIN, Arranged, arranged
from recsys.serving.candidates import (
    Popular,
    Queries,
    Reading,
    Retrieved,
    ignored,
    passed_over,
)
from recsys.serving.catalogue import NONE, Catalogue, Indices
from recsys.serving.delta import Delta, View
from recsys.serving.graphs import ENCODED, check_inputs, open_graph
from recsys.serving.log import Complaint
from recsys.serving.messages import (
    Answer,
    ItemAnswer,
    RankAnswer,
    RankedItem,
    RankRequest,
    RecommendRequest,
    SimilarAnswer,
    milliseconds,
)
from recsys.serving.paths import EMPTY, Trajectory, event_times, given, joined, since, stored
from recsys.serving.ranking import Asked, Ranker, Scored
from recsys.serving.rules import (
    NO_RULES,
    WIDER,
    boosted,
    in_order,
    rules_of,
    until_enough,
)

if TYPE_CHECKING:
    import onnxruntime

    from recsys.serving.state import UserPath

__all__ = ["Engine", "UnknownItem", "event_times", "use_one_core"]

Arm = Literal["champion", "challenger"]


class UnknownItem(InputError):
    """An item id that the bundle does not hold."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One request's items in their places, and who chose them."""

    items: Arranged
    source: Literal["model", "popular"]
    fallback: Literal["ranker"] | None = None


class Stopwatch:
    """Milliseconds of each stage, one after the other."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.since = time.perf_counter_ns()

    def lap(self, stage: str) -> None:
        """End the stage `stage`, or a further part of it; the next one begins."""
        now = time.perf_counter_ns()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + (now - self.since) / 1e6, 3)
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
        self.space = str(bundle.manifest["files"][ENCODER]["sha256"])[:16]
        self.unchanged = Delta.none(self.catalogue, index, self.space, bundle.retired)
        self.base = self.unchanged.view
        self.users = bundle.users
        self.version = bundle.version
        self.max_length = bundle.max_length
        self.reach = max(bundle.max_length, ranker.max_length if ranker else 0)
        self.inputs = bundle.encoder_inputs
        self.has_time = bundle.has_time
        # Plain arrays over the mapped pages: slicing a numpy.memmap costs five times as much.
        self.events = {name: np.asarray(array) for name, array in bundle.events.items()}
        self.draws = np.random.default_rng()
        self.warm = False
        self.complaint = Complaint("ranker_failed")

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        threads: int = 1,
        verify: bool = True,
        device: str = "cpu",
        ranked: bool = True,
        exact: bool = False,
    ) -> Engine:
        """Open, verify and warm the bundle at `path`; each graph's call uses `threads` cores.

        Graphs run on `device`, where it can be used. Without `ranked` a ranker of the bundle is
        left aside; `exact` scores every item in place of the bundle's index. Raises InputError
        where the bundle is damaged, or a graph of it reads something unknown.
        """
        bundle = Bundle.open(path, verify=verify)
        check_inputs(bundle.encoder_path, bundle.encoder_inputs, ENCODED)
        session = open_graph(bundle.encoder_path, threads, device)
        vectors_ND, facts = bundle.vectors_ND, bundle.manifest["index"]
        index = (
            ItemIndex.exact(vectors_ND)
            if exact
            else ItemIndex.load(bundle.index_paths, vectors_ND, facts)
        )
        ranker = Ranker.load(bundle, threads, device) if ranked else None
        engine = cls(bundle, session, index, ranker)
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Answer no history, the shortest and the longest, so that no user waits for the first.

        Raises what the ranker raises: once warm, its failures are answered without it.
        """
        for length in (0, 1, self.max_length):
            best = self.catalogue.by_popularity[:length].tolist()
            ids = [self.catalogue.ids[item] for item in islice(cycle(best), length)]
            self.recommend([RecommendRequest(history=[*ids])])
        self.warm = True

    def recommend(
        self,
        requests: Sequence[RecommendRequest],
        paths: Sequence[UserPath | None] | None = None,
        answer_ids: Sequence[str] | None = None,
        arm: Arm = "champion",
        view: View | None = None,
    ) -> list[Answer]:
        """Answer each request; a batch gives the same items as one request at a time.

        paths: what each request's user did since the bundle was made, None where nothing is known;
        a request with a history of its own leaves it aside. answer_ids and arm go into the answers.
        view: the items as they are now, where some were added or removed (`recsys.serving.delta`).
        Raises InputError where a request cannot be answered with this bundle.
        """
        watch, view = Stopwatch(), view or self.base
        given_paths = paths or [None] * len(requests)
        readings = [self._read(*pair, view) for pair in zip(requests, given_paths, strict=True)]
        watch.lap("history")
        chosen = self.choose(readings, watch)
        items = [view.catalogue.recommended(*one.items) for one in chosen]
        watch.lap("answer")
        return [
            Answer(
                items=items[row],
                source=chosen[row].source,
                bundle=self.version,
                timings_ms=watch.stages,
                history_used=len(reading.path.items),
                ignored=reading.ignored,
                answer_id=answer_ids[row] if answer_ids else "",
                arm=arm,
                fallback=chosen[row].fallback,
                path=reading.checksum,
            )
            for row, reading in enumerate(readings)
        ]

    def choose(self, readings: Sequence[Reading], watch: Stopwatch | None = None) -> list[Chosen]:
        """Return the items of each request, as indices."""
        watch = watch or Stopwatch()
        sources = self._sources(readings, watch)
        chosen = [self._chosen(source) for source in sources]
        watch.lap("search" if self.ranker is None else "rank")
        return chosen

    def popular(
        self, request: RecommendRequest, path: UserPath | None = None, view: View | None = None
    ) -> Answer:
        """Answer with popular items whatever the history, by the request's filters and rules.

        For when the model cannot answer in time: some tens of microseconds, no graph is run, and
        the answer is neither diverse nor explores.
        """
        watch, view = Stopwatch(), view or self.base
        reading = self._read(replace(request, diversity=0.0, explore=0.0), path, view)
        items = view.catalogue.recommended(*self._ruled(self._popular(reading)))
        watch.lap("answer")
        return Answer(items, "popular", self.version, watch.stages, ignored=reading.ignored)

    def rank(
        self,
        request: RankRequest,
        path: UserPath | None = None,
        answer_id: str = "",
        arm: Arm = "champion",
        view: View | None = None,
    ) -> RankAnswer:
        """Order a caller's own items; `path` and `view` as in `recommend`.

        Raises InputError where the request cannot be answered, or the bundle knows no item of it.
        """
        watch, view = Stopwatch(), view or self.base
        reading, known = self._own(view, request, path)
        watch.lap("history")
        source = self._source(reading)
        watch.lap("encode")
        scored, chooser, fallback = self._weighed(source, known)
        items = _told(view.catalogue.ids, known, scored, self._tasks, request.k)
        watch.lap("rank")
        return RankAnswer(
            items=items,
            source=chooser,
            bundle=self.version,
            timings_ms=watch.stages,
            history_used=len(reading.path.items),
            ignored=reading.ignored,
            answer_id=answer_id,
            arm=arm,
            fallback=fallback,
            path=reading.checksum,
        )

    def as_given(
        self, request: RankRequest, path: UserPath | None = None, view: View | None = None
    ) -> RankAnswer:
        """Answer with a caller's own items in their order, for when ranking them took too long."""
        watch, view = Stopwatch(), view or self.base
        reading, known = self._own(view, request, path)
        items = [RankedItem(view.catalogue.ids[item]) for item in known[: request.k].tolist()]
        watch.lap("answer")
        return RankAnswer(items, "given", self.version, watch.stages, ignored=reading.ignored)

    def checksum(self, request: RecommendRequest, path: UserPath | None = None) -> int:
        """Return `Answer.path` of what `request` would be answered."""
        return self._read(request, path).checksum

    def scores(
        self, request: RecommendRequest, item_ids: Sequence[str], path: UserPath | None = None
    ) -> list[float]:
        """Return the scores that items would have in an answer to `request`, boosts included.

        Raises UnknownItem.
        """
        reading = self._read(request, path)
        items = np.array([self._known(item_id, self.base) for item_id in item_ids], np.int64)
        source, boost = self._source(reading), reading.rules.boost
        scores_C = source.score(items).astype(float)
        if self.ranker is not None and self._ranks(source):
            scores_C = self._judged(self.ranker, source, items).scores_C
        return (scores_C if boost is None else scores_C + boost.of(items)).tolist()

    def stored_events(self, user_id: str, erased_before: int = 0) -> int:
        """Return how many events of a user the bundle holds that an erasure has not undone."""
        row = self.users.get(user_id)
        if row is None:
            return 0
        return len(since(stored(self.events, row), erased_before, self.has_time).items)

    def similar(self, item_id: str, k: int = 10, view: View | None = None) -> SimilarAnswer:
        """Return the `k` items whose vectors point most nearly the same way; scores are cosines.

        Compared exactly against all items. Raises UnknownItem.
        """
        watch, view = Stopwatch(), view or self.base
        row = self._known(item_id, view) - 1
        norms = np.maximum(view.index.norms, 1e-12)
        scores_N = view.index.score_all(view.index.vectors_ND[np.array([row])])[1:]
        cosines_N = scores_N / (norms * norms[row])
        cosines_N[row] = -np.inf
        best = _top(cosines_N, min(k, len(cosines_N) - 1))
        best = best[cosines_N[best] > -np.inf]
        watch.lap("search")
        items = view.catalogue.recommended((best + 1).tolist(), cosines_N[best].tolist())
        watch.lap("answer")
        return SimilarAnswer(item_id, items, self.version, watch.stages)

    def item(self, item_id: str, view: View | None = None) -> ItemAnswer:
        """Return what the bundle knows about an item; raise UnknownItem."""
        catalogue = (view or self.base).catalogue
        index = self._known(item_id, view or self.base)
        count = int(catalogue.popularity(np.array([index]))[0])
        return ItemAnswer(item_id, count, catalogue.features(index), self.version)

    def _known(self, item_id: str, view: View) -> int:
        index: int | None = view.catalogue.index.get(item_id)
        if index is None:
            raise UnknownItem(f"bundle {self.version} has no item {item_id[:100]!r}")
        return index

    def _read(
        self,
        request: RecommendRequest,
        live: UserPath | None = None,
        view: View | None = None,
        unknown_items: Sequence[str] = (),
    ) -> Reading:
        view = view or self.base
        now = int(time.time() * 1000) if request.now is None else milliseconds(request.now)
        unknown = [*unknown_items]
        user, path = self._path(request, live, now, unknown)
        added = view.catalogue.added(_named(request, live)) if request.exclude_seen else ()
        return self.readings(request, [(user, path)], now, unknown, view, added)[0]

    def readings(
        self,
        request: RecommendRequest,
        people: Iterable[tuple[int, Trajectory]],
        now: int,
        unknown: list[str],
        view: View | None = None,
        seen: Iterable[int] = (),
    ) -> list[Reading]:
        """Resolve one request for people by their rows plus one, 0 for unknown, and their paths.

        now: milliseconds. unknown: ids of items in it that the bundle does not have. seen: items
        beside those of the path that are not to be recommended again.
        Raises InputError where the request cannot be answered with this bundle.
        """
        view = view or self.base
        excluded = [*seen, *_indices(view, request.exclude_items, unknown)]
        chosen = view.catalogue.filter(request.allow_categories, request.deny_categories)
        rules = rules_of(request, view.catalogue, view.boosts)
        lacking, recency = ignored(unknown, chosen, rules), self._recency(request)
        readings = []
        for user, path in people:
            at = now if self.has_time or not len(path.times) else int(path.times[-1]) + 1
            requested, weights_T = self._asked_of_ranker(request, user, at)
            reading = Reading(
                view=view,
                path=path.last(self.reach),
                out=passed_over(excluded, path if request.exclude_seen else EMPTY),
                filter=chosen,
                rules=rules,
                user=user,
                now=at,
                recency=recency,
                k=request.k,
                ignored=lacking,
                requested=requested,
                weights_T=weights_T,
            )
            readings.append(reading)
        return readings

    def _asked_of_ranker(
        self, request: RecommendRequest, user: int, now: int
    ) -> tuple[Arrays, NDArray[np.float64]]:
        """Return a request's own arrays and task weights; raise InputError without a use for them.

        In a bundle without a ranker, or with one that has neither, both have no effect.
        """
        ranker, tasks = self.ranker, request.weights.tasks
        if request.context and (ranker is None or ranker.encoded is None):
            raise InputError(
                f"context: {', '.join(request.context)[:60]} has no effect on bundle "
                f"{self.version}: it has no ranker that reads a context; leave it out, or train "
                "with features of the request and export again"
            )
        if tasks and (ranker is None or not ranker.tasks):
            raise InputError(
                f"weights.tasks: {', '.join(tasks)[:60]} has no effect on bundle {self.version}: "
                "it has no ranker of tasks; leave it out, or train one and export again"
            )
        if ranker is None:
            return {}, np.zeros(0)
        return ranker.requested(user, request.context, now), ranker.weights(tasks)

    def _own(
        self, view: View, request: RankRequest, path: UserPath | None
    ) -> tuple[Reading, NDArray[np.int64]]:
        """Read a request with its own items; return it and those that the bundle knows."""
        unknown: list[str] = []
        known = _indices(view, [*dict.fromkeys(request.items)], unknown)
        if not known:
            raise InputError(
                f"items: bundle {self.version} knows none of the {len(unknown)} given, such as "
                f"{unknown[0][:60]!r}; expected ids of its items"
            )
        reading = self._read(request.person(), path, view, unknown)
        return reading, np.array(known, np.int64)

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

    def _sources(self, readings: Sequence[Reading], watch: Stopwatch) -> list[Retrieved | Popular]:
        """Encode and search for those with a history; the others are shown what is popular."""
        modelled = [reading for reading in readings if len(reading.path.items)]
        arrays = self._arrays(modelled)
        queries_BHD = self._encode(arrays, len(modelled))
        watch.lap("encode")
        first = self._search(queries_BHD, modelled)
        found = iter(
            Retrieved(reading, queries_HD, row, hits, self._width(reading))
            for reading, queries_HD, row, hits in zip(
                modelled, queries_BHD, self._rows(modelled, arrays), first, strict=True
            )
        )
        sources = [next(found) if len(r.path.items) else self._popular(r) for r in readings]
        watch.lap("search")
        return sources

    def _source(self, reading: Reading) -> Retrieved | Popular:
        """Return one request's source, for scores alone: nothing is searched."""
        if not len(reading.path.items):
            return self._popular(reading)
        arrays = self._arrays([reading])
        row = self._rows([reading], arrays)[0]
        queries_HD = self._encode(arrays, 1)[0]
        return Retrieved(reading, queries_HD, row, NOTHING, 0)

    def _popular(self, reading: Reading) -> Popular:
        shape = int(self.bundle.manifest["interests"]), self.bundle.vectors_ND.shape[1]
        arrays = self._arrays([reading]) if self.ranker and self.ranker.encoded else {}
        queries_HD, width = np.zeros(shape, np.float32), self._width(reading)
        return Popular(reading, queries_HD, arrays, width)

    def _rows(self, readings: Sequence[Reading], arrays: Arrays) -> list[Arrays]:
        """Return of each request what its ranker reads of the encoded history, if there is one."""
        ranker = self.ranker
        if ranker is None:
            return [{}] * len(readings)
        if ranker.max_length != self.max_length:
            arrays = self._arrays(readings, ranker.max_length)
        names = (*ranker.inputs, "items")
        return [_row(arrays, row, names) for row in range(len(readings))]

    def _arrays(self, readings: Sequence[Reading], max_length: int | None = None) -> Arrays:
        """Return everything that a graph may read of the requests."""
        if not readings:
            return {}
        histories = Histories.of([reading.path for reading in readings])
        now = np.array([reading.now for reading in readings], np.int64)
        recency = np.array([reading.recency for reading in readings], np.float32)
        users = np.array([reading.user for reading in readings], np.int64)
        length = max_length or self.max_length
        return encode(histories, length, now, recency) | {"users": users}

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
            index: Any = readings[rows[0]].view.index
            hits = index.nearest(queries_BHD[rows], width, outs, subset)
            found.update(zip(rows, hits, strict=True))
        return [found[row] for row in range(len(readings))]

    def _width(self, reading: Reading) -> int:
        """Return how many items to search for first: rules or a ranker choose among more."""
        rules = reading.rules
        width = reading.k if rules.cap is None else WIDER * reading.k
        candidates = 0 if self.ranker is None else self.ranker.candidates
        if rules.diversity or rules.explore:
            width, candidates = WIDER * reading.k, candidates or WITHIN
        return max(width, candidates)

    def _ranks(self, source: Retrieved | Popular) -> bool:
        """Whether the ranker has a say: without features it knows nothing of who has no history."""
        ranker = self.ranker
        return ranker is not None and (ranker.encoded is not None or source.kind == "model")

    def _chosen(self, source: Retrieved | Popular) -> Chosen:
        """Return a source's best items: the ranker's, or where it fails, those of the search."""
        if self.ranker is None or not self._ranks(source):
            return Chosen(self._ruled(source), source.kind)
        try:
            return Chosen(self._ranked(self.ranker, source), "model")
        except Exception as error:
            self._failed(error)
        return Chosen(self._ruled(source), source.kind, "ranker")

    def _failed(self, error: Exception) -> None:
        """Note that the ranker failed; a bundle of which it does at once is not fit to serve."""
        if not self.warm:
            raise error
        self.complaint(error, bundle=self.version, kind=type(error).__name__)

    def _ruled(self, source: Retrieved | Popular) -> Arranged:
        """Return a source's best items by the request's rules."""
        reading, rules = source.reading, source.reading.rules
        if rules is NO_RULES:
            items, scores = source.best(reading.k)
            return Arranged(items[: reading.k].tolist(), scores[: reading.k].tolist())

        def attempt(width: int) -> tuple[Arranged, bool]:
            hits, complete = boosted(source, rules.boost, width)
            return self._arranged(hits, reading), complete

        return until_enough(source.width, reading.k, attempt)

    def _ranked(self, ranker: Ranker, source: Retrieved | Popular) -> Arranged:
        """Return what the ranker makes of a source's best items, by the request's rules."""
        reading, rules = source.reading, source.reading.rules

        def attempt(width: int) -> tuple[Arranged, bool]:
            hits, complete = boosted(source, rules.boost, width)
            return self._arranged(self._rescored(ranker, source, hits, width), reading), complete

        return until_enough(source.width, reading.k, attempt)

    def _arranged(self, ranked: Hits, reading: Reading) -> Arranged:
        view = reading.view
        categories, vectors_ND = view.catalogue.categories, view.index.vectors_ND
        return arranged(ranked, reading.k, reading.rules, categories, vectors_ND, self.draws)

    def _rescored(
        self, ranker: Ranker, source: Retrieved | Popular, hits: Hits, width: int
    ) -> Hits:
        """Order the first `width` hits, and items boosted by their ids, by the ranker's scores."""
        boost = source.reading.rules.boost
        items, retrieval_C = hits[0][:width], hits[1][:width]
        if boost is not None:
            named = boost.named[source.eligible(boost.named)]
            items = np.concatenate([items, named[~np.isin(named, items)]])
        if boost is not None or source.kind == "popular":
            retrieval_C = source.retrieval(items)
        if not len(items):
            return NOTHING
        scores_C = self._judged(ranker, source, items, retrieval_C).scores_C
        return in_order(items, scores_C if boost is None else scores_C + boost.of(items))

    def _judged(
        self,
        ranker: Ranker,
        source: Retrieved | Popular,
        items: NDArray[np.int64],
        retrieval_C: NDArray[np.floating] | None = None,
    ) -> Scored:
        """Return what the ranker says of some items, in their order."""
        reading, arrays = source.reading, source.arrays
        known = arrays | reading.requested | {"queries": source.queries_HD[None]}
        path = reading.path.last(ranker.max_length)
        asked = Asked(known, path, reading.now, reading.weights_T)
        found_C = source.retrieval(items) if retrieval_C is None else retrieval_C
        return ranker.scores(asked, items, reading.view.index.vectors_ND, found_C)

    def _weighed(
        self, source: Retrieved | Popular, items: NDArray[np.int64]
    ) -> tuple[Scored, Literal["model", "retrieval", "popular"], Literal["ranker"] | None]:
        """Return what is said of some items, by whom, and what failed."""
        fallback: Literal["ranker"] | None = None
        if self.ranker is not None and self._ranks(source):
            try:
                return self._judged(self.ranker, source, items), "model", None
            except Exception as error:
                self._failed(error)
                fallback = "ranker"
        none_CT = np.zeros((len(items), 0), np.float32)
        chooser: Literal["retrieval", "popular"] = (
            "retrieval" if source.kind == "model" else "popular"
        )
        return Scored(source.score(items).astype(float), none_CT), chooser, fallback

    @property
    def _tasks(self) -> tuple[str, ...]:
        return () if self.ranker is None else self.ranker.tasks


def _named(request: RecommendRequest, live: UserPath | None) -> Iterator[str]:
    """Yield the items that a person did something with, as far as no bundle tells."""
    if not request.history:
        yield from live.items if live else ()
    for event in request.history or ():
        yield event if isinstance(event, str) else event.item_id


def _indices(view: View, item_ids: Sequence[str], unknown: list[str]) -> list[int]:
    """Return the indices of known items; the others are added to `unknown`."""
    found = [view.catalogue.index.get(item_id) for item_id in item_ids]
    unknown += [i for i, index in zip(item_ids, found, strict=True) if index is None]
    return [index for index in found if index is not None]


def use_one_core() -> None:
    """Keep FAISS calls of this thread on one core; several requests then share the machine."""
    import faiss

    faiss.omp_set_num_threads(1)


def _row(arrays: Arrays, row: int, names: Sequence[str]) -> Arrays:
    """Return one request's arrays of some names, as if it had been encoded alone."""
    length = max(1, int(arrays["lengths"][row]))
    chosen = {name: arrays[name] for name in names if name in arrays}
    return {n: v[[row], :length] if v.ndim == 2 else v[[row]] for n, v in chosen.items()}


def _told(
    ids: Sequence[str],
    items: NDArray[np.int64],
    scored: Scored,
    tasks: Sequence[str],
    k: int | None,
) -> list[RankedItem]:
    """Return the best `k` of some items, of equal ones the most popular first."""
    order = np.lexsort((items, -scored.scores_C))[:k]
    rows = zip(
        items[order].tolist(),
        scored.scores_C[order].tolist(),
        scored.probabilities_CT[order].tolist(),
        strict=True,
    )
    # Where no ranker scored them there are tasks without probabilities.
    return [
        RankedItem(ids[item], score, dict(zip(tasks, chances, strict=False)))
        for item, score, chances in rows
    ]


def _top(values_N: NDArray[np.floating], k: int) -> Indices:
    best = np.argpartition(-values_N, k - 1)[:k] if k else NONE
    return best[np.lexsort((best, -values_N[best]))]
