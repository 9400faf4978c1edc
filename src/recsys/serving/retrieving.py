"""From what a request was read as to the items that it may be answered with: encode, search.

Shapes: B requests that have a history, H interests, D dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys.history import Arrays, Histories, encode
from recsys.index.bundle import Bundle
from recsys.index.search import NOTHING, Hits
from recsys.serving.arranging import WITHIN
from recsys.serving.candidates import Popular, Queries, Reading, Retrieved
from recsys.serving.ranking import Ranker
from recsys.serving.rules import WIDER

if TYPE_CHECKING:
    import onnxruntime

Source = Retrieved | Popular


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


class Retrieval:
    """A bundle's encoder, and the searches that its queries are for."""

    def __init__(
        self, bundle: Bundle, session: onnxruntime.InferenceSession, ranker: Ranker | None
    ) -> None:
        self.session, self.ranker = session, ranker
        self.inputs, self.max_length = bundle.encoder_inputs, bundle.max_length
        self.shape = int(bundle.manifest["interests"]), bundle.vectors_ND.shape[1]

    def sources(self, readings: Sequence[Reading], watch: Stopwatch) -> list[Source]:
        """Encode and search for those with a history; the others are shown what is popular."""
        sources = self._sources(readings, watch, self._search)
        watch.lap("search")
        return sources

    def encoded(self, readings: Sequence[Reading]) -> list[Source]:
        """Return requests' sources for scores alone: nothing is searched."""
        return self._sources(readings, Stopwatch(), lambda _, rows: [NOTHING] * len(rows))

    def _sources(
        self,
        readings: Sequence[Reading],
        watch: Stopwatch,
        search: Callable[[Queries, Sequence[Reading]], list[Hits]],
    ) -> list[Source]:
        modelled = [reading for reading in readings if len(reading.path.items)]
        arrays = self._arrays(modelled)
        queries_BHD = self._encode(arrays, len(modelled))
        watch.lap("encode")
        first = search(queries_BHD, modelled)
        found = iter(
            Retrieved(reading, queries_HD, row, hits, self._width(reading))
            for reading, queries_HD, row, hits in zip(
                modelled, queries_BHD, self._rows(modelled, arrays), first, strict=True
            )
        )
        return [next(found) if len(r.path.items) else self.popular(r) for r in readings]

    def popular(self, reading: Reading) -> Popular:
        """Return what is popular, for a request of whatever history."""
        arrays = self._arrays([reading]) if self.ranker and self.ranker.encoded else {}
        queries_HD, width = np.zeros(self.shape, np.float32), self._width(reading)
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


def _row(arrays: Arrays, row: int, names: Sequence[str]) -> Arrays:
    """Return one request's arrays of some names, as if it had been encoded alone."""
    length = max(1, int(arrays["lengths"][row]))
    chosen = {name: arrays[name] for name in names if name in arrays}
    return {n: v[[row], :length] if v.ndim == 2 else v[[row]] for n, v in chosen.items()}
