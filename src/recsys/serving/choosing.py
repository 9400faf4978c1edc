"""From the items that were found to those that are answered with: rank, then apply the rules.

Shapes: C candidates, T tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recsys.index.search import NOTHING, Hits
from recsys.serving.arranging import Arranged, arranged
from recsys.serving.candidates import Reading
from recsys.serving.log import Complaint
from recsys.serving.ranking import Asked, Ranker, Scored
from recsys.serving.retrieving import Source
from recsys.serving.rules import NO_RULES, boosted, in_order, until_enough

Judge = Literal["model", "retrieval", "popular"]
"""Who says what an item's score is."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One request's items in their places, and who chose them."""

    items: Arranged
    source: Literal["model", "popular"]
    fallback: Literal["ranker"] | None = None


@dataclass(frozen=True, slots=True)
class Weighed:
    """What is said of some items, by whom, and what failed."""

    scored: Scored
    by: Judge
    fallback: Literal["ranker"] | None = None


class Choice:
    """A bundle's ranker, where it has one, and the rules of requests.

    `warm`: the ranker has answered; from then on its failures are answered without it.
    """

    def __init__(self, ranker: Ranker | None, version: str) -> None:
        self.ranker, self.version = ranker, version
        self.draws, self.warm = np.random.default_rng(), False
        self.complaint = Complaint("ranker_failed")

    def of(self, source: Source) -> Chosen:
        """Return a source's best items: the ranker's, or where it fails, those of the search."""
        if self.ranker is None or not self.ranks(source):
            return Chosen(self.ruled(source), source.kind)
        try:
            return Chosen(self._ranked(self.ranker, source), "model")
        except Exception as error:
            self._failed(error)
        return Chosen(self.ruled(source), source.kind, "ranker")

    def ruled(self, source: Source) -> Arranged:
        """Return a source's best items by the request's rules."""
        reading, rules = source.reading, source.reading.rules
        if rules is NO_RULES:
            items, scores = source.best(reading.k)
            return Arranged(items[: reading.k].tolist(), scores[: reading.k].tolist())

        def attempt(width: int) -> tuple[Arranged, bool]:
            hits, complete = boosted(source, rules.boost, width)
            return self._arranged(hits, reading), complete

        return until_enough(source.width, reading.k, attempt)

    def weighed(self, source: Source, items: NDArray[np.int64]) -> Weighed:
        """Return what is said of some items: by the ranker, or where it fails, by the search."""
        fallback: Literal["ranker"] | None = None
        if self.ranks(source):
            try:
                return Weighed(self.scored(source, items), "model")
            except Exception as error:
                self._failed(error)
                fallback = "ranker"
        by: Judge = "retrieval" if source.kind == "model" else "popular"
        return Weighed(_found(source, items), by, fallback)

    def scored(self, source: Source, items: NDArray[np.int64]) -> Scored:
        """Return what the ranker says of some items, or where it has no say, the search."""
        if self.ranker is not None and self.ranks(source):
            return self.judged(self.ranker, source, items)
        return _found(source, items)

    def judged(
        self,
        ranker: Ranker,
        source: Source,
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

    def ranks(self, source: Source) -> bool:
        """Whether the ranker has a say: without features it knows nothing of who has no history."""
        ranker = self.ranker
        return ranker is not None and (ranker.encoded is not None or source.kind == "model")

    def _ranked(self, ranker: Ranker, source: Source) -> Arranged:
        """Return what the ranker makes of a source's best items, by the request's rules."""
        reading, rules = source.reading, source.reading.rules

        def attempt(width: int) -> tuple[Arranged, bool]:
            hits, complete = boosted(source, rules.boost, width)
            return self._arranged(self._rescored(ranker, source, hits, width), reading), complete

        return until_enough(source.width, reading.k, attempt)

    def _rescored(self, ranker: Ranker, source: Source, hits: Hits, width: int) -> Hits:
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
        scores_C = self.judged(ranker, source, items, retrieval_C).scores_C
        return in_order(items, scores_C if boost is None else scores_C + boost.of(items))

    def _arranged(self, ranked: Hits, reading: Reading) -> Arranged:
        view = reading.view
        categories, vectors_ND = view.catalogue.categories, view.index.vectors_ND
        return arranged(ranked, reading.k, reading.rules, categories, vectors_ND, self.draws)

    def _failed(self, error: Exception) -> None:
        """Note that the ranker failed; a bundle of which it does at once is not fit to serve."""
        if not self.warm:
            raise error
        self.complaint(error, bundle=self.version, kind=type(error).__name__)


def _found(source: Source, items: NDArray[np.int64]) -> Scored:
    """Return what the search itself says of some items."""
    return Scored(source.score(items).astype(float), np.zeros((len(items), 0), np.float32))
