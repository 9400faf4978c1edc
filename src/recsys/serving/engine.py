"""From requests to answers on one bundle: read the history, encode, search, rank, apply rules.

Shapes: B requests that have a history, H interests, D dim, C candidates, K answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from recsys.index.bundle import ENCODER, Bundle
from recsys.index.search import ItemIndex
from recsys.serving.candidates import Reading
from recsys.serving.catalogue import NONE, Catalogue, Indices
from recsys.serving.choosing import Choice, Chosen
from recsys.serving.delta import Delta, View
from recsys.serving.explain_messages import ExplainAnswer, ExplainRequest
from recsys.serving.explaining import Erasures
from recsys.serving.graphs import ENCODED, check_inputs, open_graph
from recsys.serving.messages import (
    Answer,
    ItemAnswer,
    RankAnswer,
    RankedItem,
    RankRequest,
    RecommendRequest,
    SimilarAnswer,
)
from recsys.serving.ranking import Ranker, Scored
from recsys.serving.reading import Reader
from recsys.serving.retrieving import Retrieval, Stopwatch

if TYPE_CHECKING:
    import onnxruntime

    from recsys.serving.state import UserPath

Arm = Literal["champion", "challenger"]


class Engine:
    """One loaded bundle that answers; safe to call from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        session: onnxruntime.InferenceSession,
        index: ItemIndex,
        ranker: Ranker | None = None,
    ) -> None:
        self.bundle, self.version = bundle, bundle.version
        self.search_index, self.ranker = index, ranker
        self.catalogue = Catalogue(bundle, index)
        self.space = str(bundle.manifest["files"][ENCODER]["sha256"])[:16]
        self.unchanged = Delta.none(self.catalogue, index, self.space, bundle.retired)
        self.base = self.unchanged.view
        self.reader = Reader(bundle, self.catalogue, ranker)
        self.retrieval = Retrieval(bundle, session, ranker)
        self.choice = Choice(ranker, bundle.version)

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
        for length in (0, 1, self.bundle.max_length):
            best = self.catalogue.by_popularity[:length].tolist()
            ids = [self.catalogue.ids[item] for item in islice(cycle(best), length)]
            self.recommend([RecommendRequest(history=[*ids])])
        self.choice.warm = True

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
        pairs = zip(requests, given_paths, strict=True)
        readings = [self.reader.read(*pair, view) for pair in pairs]
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
        sources = self.retrieval.sources(readings, watch)
        chosen = [self.choice.of(source) for source in sources]
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
        reading = self.reader.read(replace(request, diversity=0.0, explore=0.0), path, view)
        ruled = self.choice.ruled(self.retrieval.popular(reading))
        items = view.catalogue.recommended(*ruled)
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
        reading, known = self.reader.own(view, request, path)
        watch.lap("history")
        (source,) = self.retrieval.encoded([reading])
        watch.lap("encode")
        said = self.choice.weighed(source, known)
        tasks = () if self.ranker is None else self.ranker.tasks
        items = _told(view.catalogue.ids, known, said.scored, tasks, request.k)
        watch.lap("rank")
        return RankAnswer(
            items=items,
            source=said.by,
            bundle=self.version,
            timings_ms=watch.stages,
            history_used=len(reading.path.items),
            ignored=reading.ignored,
            answer_id=answer_id,
            arm=arm,
            fallback=said.fallback,
            path=reading.checksum,
        )

    def explain(
        self, request: ExplainRequest, path: UserPath | None = None, view: View | None = None
    ) -> ExplainAnswer:
        """Say what items' scores owe to events of the path; `path` and `view` as in `recommend`.

        Raises InputError as `rank` does, and where items have no categories to explain by.
        """
        watch, view = Stopwatch(), view or self.base
        erasures = Erasures.of(self.reader, request, path, view)
        watch.lap("history")
        sources = self.retrieval.encoded(erasures.readings)
        watch.lap("encode")
        said = [self.choice.weighed(source, erasures.items_C) for source in sources]
        items = erasures.explained(said, request.reasons)
        watch.lap("rank")
        return ExplainAnswer(
            items=items,
            source=said[0].by,
            bundle=self.version,
            timings_ms=watch.stages,
            history_used=len(erasures.readings[0].path.items),
            ignored=erasures.readings[0].ignored,
            fallback=said[0].fallback,
        )

    def as_given(
        self, request: RankRequest, path: UserPath | None = None, view: View | None = None
    ) -> RankAnswer:
        """Answer with a caller's own items in their order, for when ranking them took too long."""
        watch, view = Stopwatch(), view or self.base
        reading, known = self.reader.own(view, request, path)
        items = [RankedItem(view.catalogue.ids[item]) for item in known[: request.k].tolist()]
        watch.lap("answer")
        return RankAnswer(items, "given", self.version, watch.stages, ignored=reading.ignored)

    def checksum(self, request: RecommendRequest, path: UserPath | None = None) -> int:
        """Return `Answer.path` of what `request` would be answered."""
        return self.reader.read(request, path, self.base).checksum

    def scores(
        self, request: RecommendRequest, item_ids: Sequence[str], path: UserPath | None = None
    ) -> list[float]:
        """Return the scores that items would have in an answer to `request`, boosts included.

        Raises UnknownItem.
        """
        reading = self.reader.read(request, path, self.base)
        items = np.array([self.reader.known(i, self.base) for i in item_ids], np.int64)
        (source,), boost = self.retrieval.encoded([reading]), reading.rules.boost
        scores_C = self.choice.scored(source, items).scores_C
        return (scores_C if boost is None else scores_C + boost.of(items)).tolist()

    def similar(self, item_id: str, k: int = 10, view: View | None = None) -> SimilarAnswer:
        """Return the `k` items whose vectors point most nearly the same way; scores are cosines.

        Compared exactly against all items. Raises UnknownItem.
        """
        watch, view = Stopwatch(), view or self.base
        row = self.reader.known(item_id, view) - 1
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
        index = self.reader.known(item_id, view or self.base)
        count = int(catalogue.popularity(np.array([index]))[0])
        return ItemAnswer(item_id, count, catalogue.features(index), self.version)


def use_one_core() -> None:
    """Keep FAISS calls of this thread on one core; several requests then share the machine."""
    import faiss

    faiss.omp_set_num_threads(1)


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
