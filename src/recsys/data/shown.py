"""Examples as a ranker reads them: every array of `recsys.features`, and the batches made of them.

Shapes: Q requests, R shown items, B requests of a batch, C candidates of each, T tasks, L length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.artifacts import write_json
from recsys.data.batches import Batches
from recsys.data.dataset import Dataset
from recsys.data.examples import Examples
from recsys.data.rates import rates_as_of, snapshot
from recsys.data.transitions import TransitionLog
from recsys.features import OTHER, Features, ItemTable, Rate, gather
from recsys.features.transitions import followed, kept
from recsys.history import PER_EVENT, Arrays, Histories, encode
from recsys.schema import InputError, suggestion

FEATURES = "features.json"
CHUNK = 1024
"""Requests encoded at a time."""
Ints = NDArray[np.int64]
Query = Callable[[Ints, Histories, Ints], NDArray[np.float32]]
"""Users, their paths and moments → a retriever's queries [B, H, D]."""


@dataclass(frozen=True)
class Tables:
    """Items and users of a dataset, encoded: what a bundle keeps for ranking.

    user_codes int32 [U + 1, W], user_numbers float32 [U + 1, G]; row 0 is an unknown user.
    """

    features: Features
    items: ItemTable
    user_codes: NDArray[np.int32]
    user_numbers: NDArray[np.float32]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tables by the names under which they are kept."""
        items = self.items
        made = {"item_embeddings": items.embeddings, "added_embeddings": items.added}
        read = {"item_vectors": items.vectors} if items.embeddings is None else made
        return {
            "item_codes": items.codes,
            "item_numbers": items.numbers,
            "item_raw": items.raw,
            "user_codes": self.user_codes,
            "user_numbers": self.user_numbers,
            **kept(items.transitions),
            **{name: array for name, array in read.items() if array is not None},
        }

    def save(self, folder: Path) -> None:
        """Write `features.json` and one `.npy` file a table: in a run as in a bundle."""
        folder.mkdir(exist_ok=True)
        write_json(folder / FEATURES, self.features.as_json())
        for name, array in self.arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Tables:
        """Read what `save` wrote; raise InputError where a table is not there."""
        features = Features.of_json(json.loads((folder / FEATURES).read_text()))

        def read(name: str) -> NDArray[Any]:
            file = folder / f"{name}.npy"
            if not file.is_file():
                raise InputError(f"{file}: missing; train this ranker again with this version")
            array: NDArray[Any] = np.load(file, allow_pickle=False)
            return array

        names = ("item_codes", "item_numbers", "item_vectors", "item_raw")
        codes, numbers, vectors, raw = map(read, names)
        items = ItemTable(codes, numbers, vectors, raw, followed(features.transitions, read))
        return cls(features, items, read("user_codes"), read("user_numbers"))


@dataclass(frozen=True)
class Retrieval:
    """What a retriever makes of a training's requests and of the items.

    queries: float32 [Q, H, D]; vectors: float32 [N + 1, D].
    """

    queries: NDArray[np.float32]
    vectors: NDArray[np.float32]


def retrieved(
    queries_BHD: NDArray[np.float32], vectors_BCD: NDArray[np.float32], lengths_B: Ints
) -> Arrays:
    """Return what a ranker reads of a retriever: `queries`, `candidate_vectors`, and their product.

    `retrieval_scores` is that of the nearest interest. Where there is no history queries are 0 and
    scores NaN.
    """
    known_B1 = lengths_B[:, None] > 0
    scores_BC = np.einsum("bhd,bcd->bhc", queries_BHD, vectors_BCD).max(axis=1)
    return {
        "queries": np.where(known_B1[..., None], queries_BHD, np.float32(0)),
        "candidate_vectors": vectors_BCD,
        "retrieval_scores": np.where(known_B1, scores_BC, np.float32(np.nan)),
    }


@dataclass(frozen=True)
class Shown:
    """All requests of a training with what was shown at each, encoded once.

    request_codes, request_numbers: [Q, …]; cross_numbers [R, G]; rates float32 [R, columns of the
    log]; retrieval float32 [R], NaN where there is no history, or None without a retriever.
    """

    dataset: Dataset
    examples: Examples
    tables: Tables
    length: int
    request: Mapping[str, NDArray[Any]]
    cross: NDArray[np.float32]
    rates: NDArray[np.float32]
    retrieval: Retrieval | None = None

    @property
    def retrieval_width(self) -> int:
        """How wide the retriever's vectors are, 0 without one."""
        return 0 if self.retrieval is None else self.retrieval.vectors.shape[1]

    def requests(self, part: str) -> NDArray[np.int64]:
        """Return the requests of a part."""
        return np.arange(len(self.examples.users))[self.examples.parts[part]]

    def users_of(self, part: str) -> NDArray[np.int64]:
        """Return each shown item's user row: int64 [R]."""
        requests, offsets = self.requests(part), self.examples.offsets
        return np.repeat(self.examples.users[requests], np.diff(offsets)[requests])

    def with_retrieval(self, query: Query, vectors_ND: NDArray[np.float32]) -> Shown:
        """Return the same with a retriever's query of every request, and its item vectors."""
        examples = self.examples
        found = [
            query(examples.users[some], self.histories(some), examples.times[some])
            for some in chunks(len(examples.users))
        ]
        return replace(self, retrieval=Retrieval(np.concatenate(found), vectors_ND))

    def histories(self, requests: Ints) -> Histories:
        """Return the path before each request: the newest `length` events."""
        examples = self.examples
        return self.dataset.histories(
            examples.users[requests], examples.places[requests], self.length
        )

    def whole_histories(self, requests: Ints) -> Histories:
        """Return the whole path before each request."""
        return self.dataset.histories(self.examples.users[requests], self.examples.places[requests])

    def arrays(
        self,
        requests: Ints,
        inputs: Collection[str] | None = None,
        distinct: DistinctItems | None = None,
    ) -> Arrays:
        """Return everything that a ranker may read of some requests, and their `labels` [B, C, T].

        Where a request shows fewer items than others its row ends with item 0 and unknown labels.
        Of the path what is not among `inputs` is left out, which is most of the time; `distinct`
        looks the items of all paths up once each.
        """
        examples, rows_BC = self.examples, grid(self.examples.offsets, requests)
        real_BC = rows_BC >= 0
        items_BC = np.where(real_BC, examples.items[rows_BC], 0)
        found = self._paths(requests, inputs)
        found |= {name: values[requests] for name, values in self.request.items()}
        items_BL = found.get("items")
        found |= gather(self.tables.items, items_BC, None if distinct else items_BL)
        if distinct and items_BL is not None:
            found |= distinct(items_BL)
        if self.rates.shape[1]:
            found["item_numbers"][..., -self.rates.shape[1] :] = self.rates[rows_BC]
        if self.cross.shape[1]:
            found["cross_numbers"] = self.cross[rows_BC]
        if self.retrieval is not None:
            queries_BHD, vectors_ND = self.retrieval.queries[requests], self.retrieval.vectors
            found |= retrieved(queries_BHD, vectors_ND[items_BC], examples.places[requests])
        labels_BCT = np.where(real_BC[..., None], examples.labels[rows_BC], np.nan)
        return found | {"labels": labels_BCT.astype(np.float32)}

    def _paths(self, requests: Ints, inputs: Collection[str] | None) -> Arrays:
        if inputs is not None and "path_codes" not in inputs:
            return {}
        asked = self.histories(requests), self.length, self.examples.times[requests]
        return encode(*asked, of_events=PER_EVENT if inputs is None else ("items", *inputs))


def asked(
    tables: Tables,
    length: int,
    users: Ints,
    histories: Histories,
    now: Ints,
    items_BC: Ints,
    queries_BHD: NDArray[np.float32],
    vectors_ND: NDArray[np.float32],
) -> Arrays:
    """Return everything that a ranker may read of people who ask now, without any context."""
    kept = histories.last(length)
    found = encode(kept, length, now) | bare_requests(tables, users, now)
    found |= gather(tables.items, items_BC, found["items"])
    found |= tables.features.crossed(kept, now, items_BC, tables.items)
    return found | retrieved(queries_BHD, vectors_ND[items_BC], found["lengths"])


def bare_requests(tables: Tables, users: Ints, now: Ints) -> Arrays:
    """Return what is known of requests that say nothing of themselves: who asks, and when."""
    known = tables.user_codes[users + 1], tables.user_numbers[users + 1]
    return tables.features.requests(*known, {}, now)


def grid(offsets: NDArray[np.int64], requests: Ints) -> NDArray[np.int64]:
    """Return each request's rows, -1 where others have more: int64 [B, C].

    >>> grid(np.array([0, 2, 3]), np.array([0, 1])).tolist()
    [[0, 1], [2, -1]]
    """
    first, counts = offsets[requests], offsets[requests + 1] - offsets[requests]
    places = np.arange(int(counts.max(initial=1)))
    return np.where(places < counts[:, None], first[:, None] + places, -1)


def fitted(
    dataset: Dataset, examples: Examples, columns: Mapping[str, Mapping[str, Any]]
) -> Features:
    """Learn declared columns from the item and user tables and the training part's context.

    Raises InputError where one does not fit the tables, or is a rate of a task that is not there.
    """
    training = examples.parts["train"]
    context = {name: column[training] for name, column in examples.context.items()}
    features = Features.fit(columns, dataset.items, dataset.users, context)
    for rate in features.rates:
        _check_rate(rate, examples.tasks)
    return features


def _check_rate(rate: Rate, tasks: Sequence[str]) -> None:
    if rate.task not in tasks:
        raise InputError(
            f"features.{rate.name} is a rate of {rate.task!r}, and these examples have "
            f"{', '.join(tasks)}{suggestion(rate.task, tasks)}; leave it out: ~features.{rate.name}"
        )


def shown(dataset: Dataset, examples: Examples, features: Features, length: int) -> Shown:
    """Encode all requests; `length` is how much of each path is read.

    The tables are as of the beginning of the test part, so that no test reads its own outcome.
    """
    tested = examples.times[examples.parts["test"]].min()
    tables = tables_at(dataset, examples, features, int(tested))
    request = features.requests(
        tables.user_codes[examples.users + 1],
        tables.user_numbers[examples.users + 1],
        examples.context,
        examples.times,
    )
    then = {r.name: rates_as_of(examples, *_read(r, tables)) for r in features.rates}
    rates = features.log_numbers(then, len(examples.items))
    nothing = np.zeros((len(examples.items), 0), np.float32)
    bare = Shown(dataset, examples, tables, length, request, nothing, rates)
    return replace(bare, cross=_crossed(bare))


def tables_at(
    dataset: Dataset, examples: Examples, features: Features, before: int | None = None
) -> Tables:
    """Encode items and users, with the log's rates as of a moment; None: as of its end."""
    unknown = np.full(dataset.num_items + 1, np.nan)
    bare = features.items(dataset.items, {rate.name: unknown for rate in features.rates})
    users = features.users(dataset.users)
    tables = Tables(features, bare, *users)
    now = {r.name: snapshot(examples, *_read(r, tables), before=before) for r in features.rates}
    transitions = tuple(log.before(before) for log in _transition_logs(dataset, tables))
    items = features.items(dataset.items, now, unmet(dataset, examples, features.least_met))
    items = replace(items, transitions=transitions)
    return replace(tables, items=items)


def unmet(dataset: Dataset, examples: Examples, least: int) -> NDArray[np.bool_]:
    """Return which items training has met less than `least` times, in events and shown: [N + 1]."""
    trained = examples.items[: examples.offsets[examples.parts["train"].stop]]
    shown_N = np.bincount(trained, minlength=dataset.num_items + 1)
    unknown = (shown_N < least) & (dataset.train_count < least)
    unknown[0] = False
    return unknown


def _read(rate: Rate, tables: Tables) -> tuple[NDArray[np.int32], str, float]:
    """Return the code of each item that a rate is by, its task and its prior."""
    return tables.features.codes_of(rate.by, tables.items), rate.task, rate.prior


def _transition_logs(dataset: Dataset, tables: Tables) -> list[TransitionLog]:
    """Return what came next in the log, as of any day, for each declared transition."""
    features, items = tables.features, tables.items
    return [
        TransitionLog(dataset, features.codes_of(one.by, items), one.prior)
        for one in features.transitions
    ]


def _crossed(shown: Shown) -> NDArray[np.float32]:
    examples, features = shown.examples, shown.tables.features
    logs = _transition_logs(shown.dataset, shown.tables)
    items = replace(shown.tables.items, transitions=tuple(logs))
    width = len(features.layout.cross_numbers)
    found = np.zeros((len(examples.items), width), np.float32)
    for requests in chunks(len(examples.users)) if width else ():
        rows_BC = grid(examples.offsets, requests)
        real_BC = rows_BC >= 0
        arrays = features.crossed(
            shown.histories(requests),
            examples.times[requests],
            np.where(real_BC, examples.items[rows_BC], 0),
            items,
            examples.positions[rows_BC],
        )
        found[rows_BC[real_BC]] = arrays["cross_numbers"][real_BC]
    return found


def chunks(total: int, size: int = CHUNK) -> Iterator[NDArray[np.int64]]:
    """Return 0 to `total` - 1, so many at a time."""
    return (np.arange(start, min(start + size, total)) for start in range(0, total, size))


class DistinctItems:
    """Looks up codes [N + 1, W] of the items of some paths, those of items that are alike once.

    Items are told apart by a 64-bit hash of their codes: for two of 10^6 to agree by chance, one in
    10^7 catalogues.
    """

    def __init__(self, codes_NW: NDArray[np.integer]) -> None:
        odd_W = np.random.default_rng(0).integers(1 << 62, size=codes_NW.shape[1]) * 2 + 1
        hash_N = codes_NW @ odd_W
        _, self.first_K, kind_N = np.unique(hash_N, return_index=True, return_inverse=True)
        # Half of the bytes of int64, which is what takes the time.
        self.kind_N = kind_N.astype(np.int32)
        self.codes_NW, self.places_K = codes_NW, np.empty(len(self.first_K), np.int32)

    def __call__(self, items_BL: Ints) -> Arrays:
        """Return `path_codes` int64 [U, W] of U kinds of item, `path_places` int32 [B, L] in them.

        >>> distinct = DistinctItems(np.array([[0], [5], [6], [5]]))
        >>> found = distinct(np.array([[2, 0, 1], [2, 3, 2]]))
        >>> found["path_codes"][found["path_places"], 0].tolist(), len(found["path_codes"])
        ([[6, 0, 5], [6, 5, 6]], 3)
        """
        kinds_BL = self.kind_N.take(items_BL)
        flat_P, places_K = kinds_BL.ravel(), self.places_K
        at_P = np.arange(len(flat_P), dtype=np.int32)
        places_K[flat_P] = at_P  # of each kind one place stays
        kinds_U = flat_P[places_K.take(flat_P) == at_P]
        places_K[kinds_U] = at_P[: len(kinds_U)]
        codes_UW = self.codes_NW[self.first_K[kinds_U]].astype(np.int64)
        return {"path_codes": codes_UW, "path_places": places_K.take(kinds_BL)}


class ShownBatches(Batches):
    """`size` requests a batch with all that was shown at each.

    hidden: share of the training's requests whose context values are hidden, so that the model
    knows what to do where a request leaves them out; of its shown items as many are made such as
    no training has met (Volkovs et al. 2017, section 3.1). inputs: arrays that the model reads.
    """

    layout = "shown"

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        seed: int,
        shown: Shown,
        inputs: tuple[str, ...],
        hidden: float = 0.05,
    ) -> None:
        self.shown, self.inputs, self.hidden = shown, inputs, hidden
        self.training = shown.requests("train")
        self.shows = np.diff(shown.examples.offsets)[self.training]
        path = "path_codes" in inputs
        self.distinct = DistinctItems(shown.tables.items.codes) if path else None
        super().__init__(dataset, size, seed)

    @property
    def total(self) -> int:
        """Training requests."""
        return len(self.training)

    def cost(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many items each request shows."""
        return self.shows[rows]

    def draws(self, rows: NDArray[np.int64]) -> int:
        """A number each request and shown item, by which its context, or what it is, is hidden."""
        return len(rows) + int(self.cost(rows).sum())

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return the model's inputs and `labels`."""
        requests = self.training[rows]
        arrays = self.shown.arrays(requests, self.inputs, self.distinct)
        hides = np.append(rng.random(self.draws(rows)) < self.hidden, False)
        ends = np.cumsum(1 + self.cost(rows))
        hides_BX = hides[grid(np.append(0, ends), np.arange(len(rows)))]
        self._hide(arrays, hides_BX[:, 0], requests)
        self._hide_items(arrays, hides_BX[:, 1:])
        places = () if self.distinct is None else ("path_places",)
        return {name: as_model(arrays[name]) for name in (*self.inputs, *places, "labels")}

    def _hide(self, arrays: Arrays, chosen_B: NDArray[np.bool_], requests: Ints) -> None:
        """Make a request's own context missing, as a server reads one that gives none."""
        hidden, examples = requests[chosen_B], self.shown.examples
        bare = bare_requests(self.shown.tables, examples.users[hidden], examples.times[hidden])
        for name, values in bare.items():
            arrays[name][chosen_B] = values

    def _hide_items(self, arrays: Arrays, chosen_BC: NDArray[np.bool_]) -> None:
        place = self.shown.tables.features.layout.item_index
        if place is not None:
            arrays["item_codes"][chosen_BC, place] = OTHER


def as_model(array: NDArray[Any]) -> NDArray[Any]:
    """Return indices as int64, as graphs read them; floats as they are."""
    return array if array.dtype.kind == "f" else array.astype(np.int64, copy=False)
