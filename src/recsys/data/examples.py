"""Examples of the second stage: requests in the order of time, each with what was shown for it.

Shapes: Q requests, R shown items of all of them, T tasks, B requests of a chunk, K candidates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.data.dataset import Dataset
from recsys.data.splits import moment_at
from recsys.history import Histories
from recsys.schema import EVENT_TYPES, InputError, suggestion, type_code

CHUNK = 4_096
"""Requests that candidates are retrieved for at a time."""
PARTS = ("train", "validation", "test")

Ints = NDArray[np.int64]
Retrieve = Callable[[Histories, Ints], NDArray[np.integer]]
"""Histories and the moments asked [B] to candidates [B, K], 0 where there is none."""


@dataclass(frozen=True)
class Examples:
    """Requests in the order of time; request q was shown rows `offsets[q]` to `offsets[q + 1]`.

    tasks: names of the labels' columns. users: rows of the dataset, -1 unknown. places: how many
    events of that user came strictly before. times: as those of the dataset's events. context:
    column → array [Q]. items: indices, 0 unknown. labels: float32 [R, T], NaN unknown. positions: 0
    where not logged. propensities: float32 [R], NaN unknown. parts: train, validation and test as
    slices of requests, strictly one after the other in time, unless the publisher of the log split
    it otherwise: then the order is that of time within each part, and `validation` is `test` where
    there is no such part.
    """

    tasks: tuple[str, ...]
    users: Ints
    places: Ints
    times: Ints
    context: Mapping[str, pa.Array]
    offsets: Ints
    items: Ints
    labels: NDArray[np.float32]
    positions: Ints
    propensities: NDArray[np.float32]
    parts: Mapping[str, slice]

    def __len__(self) -> int:
        return len(self.times)

    def rows(self, part: str) -> slice:
        """Return which rows belong to the requests of a part."""
        requests = self.parts[part]
        return slice(int(self.offsets[requests.start]), int(self.offsets[requests.stop]))

    def request_of_row(self) -> Ints:
        """Return the request that each row was shown for: int64 [R]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def label(self, task: str) -> NDArray[np.float32]:
        """Return one task's labels: float32 [R]. Raises InputError for a task that is not there."""
        if task not in self.tasks:
            raise InputError(
                f"no task {task!r} in these examples; they have {', '.join(self.tasks)}"
                + suggestion(task, self.tasks)
            )
        return self.labels[:, self.tasks.index(task)]


@dataclass(frozen=True)
class Cut:
    """The two moments that part training, validation and test; a moment's requests stay together.

    Given none: those of the dataset's split where it is temporal, else the newest tenth tests and
    the tenth before it validates. Shares are of requests; `validation_from` and `test_from` are
    moments, in the dataset's own time.
    """

    validation_share: float | None = None
    test_share: float | None = None
    validation_from: int | None = None
    test_from: int | None = None

    def __post_init__(self) -> None:
        shares, moments = self._pair("share"), self._pair("from")
        if shares and moments:
            raise InputError("examples.cut: give shares or moments, not both")
        if shares and (min(shares) <= 0 or sum(shares) >= 1):
            raise InputError(
                f"examples.cut: validation_share={shares[0]}, test_share={shares[1]}; expected "
                "more than 0 each and less than 1 together"
            )

    def _pair(self, kind: str) -> tuple[float, float] | None:
        pair = getattr(self, f"validation_{kind}"), getattr(self, f"test_{kind}")
        if (pair[0] is None) != (pair[1] is None):
            raise InputError(f"examples.cut: give both validation_{kind} and test_{kind}, or none")
        return None if pair[0] is None else pair

    def moments(self, dataset: Dataset, times_Q: Ints) -> tuple[int, int]:
        """Return when validation and testing begin."""
        split = dataset.manifest["split"]
        if given := self._pair("from"):
            return int(given[0]), int(given[1])
        if self._pair("share") is None and split["rule"] == "temporal":
            return split["validation_from"], split["test_from"]
        validation, test = self._pair("share") or (0.1, 0.1)
        starts = (1 - validation - test, 1 - test)
        first, second = (moment_at(times_Q, round(len(times_Q) * share)) for share in starts)
        return first, second

    def parts(self, dataset: Dataset, times_Q: Ints) -> dict[str, slice]:
        """Return the parts of requests sorted by time; raise InputError where one is empty."""
        if not len(times_Q):
            raise InputError(f"{dataset.path.name}: no requests to make examples of")
        moments = self.moments(dataset, times_Q)
        bounds = [0, *map(int, np.searchsorted(times_Q, moments)), len(times_Q)]
        parts = dict(zip(PARTS, map(slice, bounds, bounds[1:]), strict=False))
        for name, part in parts.items():
            if part.start >= part.stop:
                raise InputError(
                    f"examples: nothing in {name}: requests of {_day(dataset, times_Q[0])} to "
                    f"{_day(dataset, times_Q[-1])}, validation from {_day(dataset, moments[0])}, "
                    f"test from {_day(dataset, moments[1])}. Set both "
                    "examples.cut.validation_share and examples.cut.test_share, or give more"
                )
        return parts


USUAL_CUT = Cut()


def _day(dataset: Dataset, moment: int) -> str:
    if not dataset.has_time:
        return f"place {moment}"
    return f"{datetime.fromtimestamp(int(moment) / 1000, UTC):%Y-%m-%d %H:%M}"


def make(
    maker: Callable[..., Examples], dataset: Dataset, retriever: Callable[[], Retrieve]
) -> Examples:
    """Make the examples that a config of the group `examples` says.

    maker: what Hydra makes of it. retriever: opens what `retrieved` asks, called only for that.
    """
    if "retrieve" in inspect.signature(maker).parameters:
        return maker(dataset, retrieve=retriever())
    return maker(dataset)


def impressions(
    dataset: Dataset, tasks: Sequence[str] | None = None, cut: Cut = USUAL_CUT
) -> Examples:
    """Return the log's own impressions.

    tasks: label columns; None takes all. Parts are the publisher's where the log has them and `cut`
    says nothing. Raises InputError where the dataset has no impressions.
    """
    table, published = dataset.impressions, None
    facts = dataset.manifest["impressions"]
    if facts["parts"] and cut == USUAL_CUT:
        table, published = _by_part(table)
    starts = np.flatnonzero(np.diff(table["request"].to_numpy(), prepend=-1))
    users, times = (table[name].to_numpy()[starts].astype(np.int64) for name in _ASKED)
    labels = [_labels(table, name, facts["labels"]) for name in tasks or facts["labels"]]
    return Examples(
        tasks=tuple(tasks or facts["labels"]),
        users=users,
        places=events_before(dataset, users, times),
        times=times,
        context={name: _of_requests(table, name, starts) for name in facts["context"]},
        offsets=np.append(starts, len(table)),
        items=table["item"].to_numpy().astype(np.int64),
        labels=np.stack(labels, axis=1),
        positions=table["position"].fill_null(0).to_numpy().astype(np.int64),
        propensities=table["propensity"].to_numpy(),
        parts=published or cut.parts(dataset, times),
    )


def _by_part(table: pa.Table) -> tuple[pa.Table, dict[str, slice]]:
    """Return rows sorted by part, then as before, and the slice of requests of each part."""
    part_R = table["part"].to_numpy()
    if (np.diff(part_R) < 0).any():
        order_R = np.argsort(part_R, kind="stable")
        table, part_R = table.take(pa.array(order_R)), part_R[order_R]
    request_R = np.cumsum(np.diff(table["request"].to_numpy(), prepend=-1) != 0)
    ends = [0, *(int(request_R[part_R <= code].max(initial=0)) for code in range(len(PARTS)))]
    parts = dict(zip(PARTS, map(slice, ends, ends[1:]), strict=False))
    if ends[1] == ends[2]:
        parts["validation"] = parts["test"]
    for name, part in parts.items():
        if part.start >= part.stop:
            raise InputError(
                f"impressions: no row of the part {name!r}, and others have one; give it, or cut "
                "by time: examples.cut.validation_share=0.1 examples.cut.test_share=0.1"
            )
    return table, parts


_ASKED = ("user", "timestamp")


def _labels(table: pa.Table, name: str, known: Sequence[str]) -> NDArray[np.float32]:
    if name not in known:
        raise InputError(
            f"examples.tasks: no label {name!r} in the impressions; they have {', '.join(known)}"
            + suggestion(name, known)
        )
    return table[name].to_numpy()


def _of_requests(table: pa.Table, name: str, starts: Ints) -> pa.Array:
    column = table[name].combine_chunks()
    return column if len(starts) == len(table) else column.take(pa.array(starts))


def events_before(dataset: Dataset, users_Q: Ints, times_Q: Ints) -> Ints:
    """Return how many events of each user came strictly before each moment: int64 [Q].

    An event at the moment itself is not before it: its outcome may be what is asked. 0 for
    unknown users (-1).
    """
    known = users_Q >= 0
    offsets, times = dataset.offsets, dataset.events["times"]
    start, moments = offsets[users_Q[known]], times_Q[known]
    low, high = start, offsets[users_Q[known] + 1]
    while len(times) and (low < high).any():
        middle = (low + high) // 2
        # Where the search has ended, `middle` may lie behind the last event.
        before = (low < high) & (times[np.minimum(middle, len(times) - 1)] < moments)
        low, high = np.where(before, middle + 1, low), np.where(before, high, middle)
    places_Q = np.zeros(len(users_Q), np.int64)
    places_Q[known] = low - start
    return places_Q


def rated(
    dataset: Dataset, task: str = "like", least: float = 4.0, cut: Cut = USUAL_CUT
) -> Examples:
    """Return each event with a value as a request of its own: was the value `least` or more?

    Raises InputError where no event has a value.
    """
    values = np.asarray(dataset.events["values"])
    events = np.flatnonzero(~np.isnan(values))
    if not len(events):
        raise InputError(
            f"{dataset.path.name}: no event has a value, so examples=rated has nothing to learn; "
            "prepare it with a value column, or type examples=retrieved"
        )
    users, times = _owners(dataset)[events], np.asarray(dataset.events["times"])[events]
    order = np.argsort(times, kind="stable")
    events, users, times = events[order], users[order], times[order]
    return _without_context(
        dataset,
        tasks=(task,),
        requests=(users, times),
        offsets=np.arange(len(events) + 1),
        items=np.asarray(dataset.events["items"])[events].astype(np.int64),
        labels=(values[events] >= least).astype(np.float32)[:, None],
        cut=cut,
    )


def _owners(dataset: Dataset) -> Ints:
    return np.repeat(np.arange(dataset.num_users), np.diff(dataset.offsets))


def _without_context(
    dataset: Dataset,
    tasks: tuple[str, ...],
    requests: tuple[Ints, Ints],
    offsets: Ints,
    items: Ints,
    labels: NDArray[np.float32],
    cut: Cut,
) -> Examples:
    """Return examples of which no context, position or propensity was logged."""
    users, times = requests
    return Examples(
        tasks=tasks,
        users=users,
        places=events_before(dataset, users, times),
        times=times,
        context={},
        offsets=offsets,
        items=items,
        labels=labels,
        positions=np.zeros(len(items), np.int64),
        propensities=np.full(len(items), np.nan, np.float32),
        parts=cut.parts(dataset, times),
    )


def retrieved(
    dataset: Dataset,
    retrieve: Retrieve,
    hard: int = 10,
    easy: int = 10,
    most: int | None = None,
    longest: int = 200,
    seed: int = 0,
    cut: Cut = USUAL_CUT,
) -> Examples:
    """Return each event among items that were not chosen, for logs without impressions.

    The tasks are the dataset's event types; an event of one reached all weaker ones, too. Negatives
    are `hard` ones of those that `retrieve` finds for the history before the event, and `easy` ones
    by their training events. Training requests are training events, and the others are what the
    split predicts; only those with a history, and of each part the newest `most`. longest: newest
    events of a history that `retrieve` is given. Rows are in no order, fewer where one was drawn
    twice. Raises InputError.
    """
    if min(hard, easy) < 0 or hard + easy < 1:
        raise InputError(
            f"examples: hard={hard}, easy={easy}; expected 0 or more each, and one at least"
        )
    events, users, cut = _targets(dataset, most, cut)
    times = np.asarray(dataset.events["times"])[events]
    draw = _Draw(dataset, retrieve, hard, easy, longest, seed)
    places = events_before(dataset, users, times)
    chunks = range(0, len(events), CHUNK)
    drawn = [
        draw(start, users[one], places[one], times[one], events[one])
        for start, one in ((start, slice(start, start + CHUNK)) for start in chunks)
    ]
    items, chosen, counts = (np.concatenate(column) for column in zip(*drawn, strict=True))
    occurring = {EVENT_TYPES[0], *dataset.manifest["event_types"]}
    tasks = tuple(name for name in EVENT_TYPES if name in occurring)
    reached = np.repeat(np.asarray(dataset.events["types"])[events], counts)
    codes = np.array([type_code(name) for name in tasks])
    return _without_context(
        dataset,
        tasks=tasks,
        requests=(users, times),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        items=items,
        labels=(chosen[:, None] & (reached[:, None] >= codes)).astype(np.float32),
        cut=cut,
    )


def _targets(dataset: Dataset, most: int | None, cut: Cut) -> tuple[Ints, Ints, Cut]:
    """Return the events to predict, sorted by time, their users, and the cut in moments.

    What the split holds out is no training event, and a part holds only what lies in its time.
    """
    split, times = dataset.split, np.asarray(dataset.events["times"])
    if not len(times):
        raise InputError(f"{dataset.path.name}: no events, so type examples=impressions")
    first, second = cut.moments(dataset, times)
    owners = _owners(dataset)
    begins = dataset.offsets[:-1]
    training = np.flatnonzero(np.arange(len(times)) - begins[owners] < split.train_end[owners])
    held = [(begins + at)[at >= 0] for at in (split.validation, split.test)]
    windows = [(-(2**62), first), (first, second), (second, 2**62)]
    chosen = []
    for events, (start, end) in zip([training, *held], windows, strict=True):
        events = events[(times[events] >= start) & (times[events] < end)]
        events = events[events_before(dataset, owners[events], times[events]) > 0]
        events = events[np.argsort(times[events], kind="stable")]
        chosen.append(events[-most:] if most else events)
    found = np.concatenate(chosen)
    return found, owners[found], replace(USUAL_CUT, validation_from=first, test_from=second)


class _Draw:
    """Draws the rows of a chunk of requests: the item of the event, and negatives."""

    def __init__(
        self, dataset: Dataset, retrieve: Retrieve, hard: int, easy: int, longest: int, seed: int
    ) -> None:
        self.dataset, self.retrieve, self.longest, self.seed = dataset, retrieve, longest, seed
        self.hard, self.easy = hard, easy
        self.below = np.cumsum(dataset.train_count, dtype=np.float64)

    def __call__(
        self, start: int, users_B: Ints, places_B: Ints, times_B: Ints, events_B: Ints
    ) -> tuple[Ints, NDArray[np.bool_], Ints]:
        """Return items and whether they are the event's, flat, and how many each request has."""
        rng = np.random.default_rng([self.seed, start])
        positive_B1 = np.asarray(self.dataset.events["items"])[events_B].astype(np.int64)[:, None]
        histories = self.dataset.histories(users_B, places_B, self.longest)
        pool_BK = self._pool(histories, times_B)
        hard_BH = some_of(np.where(pool_BK == positive_B1, 0, pool_BK), self.hard, rng)
        easy_BE = self._popular((len(users_B), self.easy), rng)
        items_BC = without_repeats(np.concatenate([positive_B1, hard_BH, easy_BE], axis=1))
        # The event's own item must not be told by its place.
        order_BC = np.argsort(rng.random(items_BC.shape), axis=1)
        items_BC = np.take_along_axis(items_BC, order_BC, axis=1)
        there_BC = items_BC > 0
        return items_BC[there_BC], (order_BC == 0)[there_BC], there_BC.sum(axis=1)

    def _pool(self, histories: Histories, times_B: Ints) -> Ints:
        if not self.hard:
            return np.zeros((len(times_B), 0), np.int64)
        pool_BK = np.asarray(self.retrieve(histories, times_B), np.int64)
        assert pool_BK.ndim == 2, pool_BK.shape
        assert len(pool_BK) == len(times_B), pool_BK.shape
        return pool_BK

    def _popular(self, shape: tuple[int, int], rng: np.random.Generator) -> Ints:
        dice = rng.random(shape) * self.below[-1]
        return np.searchsorted(self.below, dice, side="right").astype(np.int64)


def some_of(pool_BK: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Draw `count` of each row's non-zero entries without replacement; 0 where it has too few.

    >>> some_of(np.array([[7, 0]]), 1, np.random.default_rng(0))
    array([[7]])
    """
    dice_BK = rng.random(pool_BK.shape) + (pool_BK == 0)
    chosen_BH = np.argsort(dice_BK, axis=1)[:, :count]
    return np.take_along_axis(pool_BK, chosen_BH, axis=1)


def without_repeats(items_BC: Ints) -> Ints:
    """Put 0 in the place of every item that is in its row already.

    >>> without_repeats(np.array([[5, 3, 5, 3]]))
    array([[5, 3, 0, 0]])
    """
    order_BC = np.argsort(items_BC, axis=1, kind="stable")
    sorted_BC = np.take_along_axis(items_BC, order_BC, axis=1)
    sorted_BC[:, 1:][sorted_BC[:, 1:] == sorted_BC[:, :-1]] = 0
    kept_BC = np.zeros_like(items_BC)
    np.put_along_axis(kept_BC, order_BC, sorted_BC, axis=1)
    return kept_BC
