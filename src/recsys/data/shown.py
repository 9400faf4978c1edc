"""Examples as a ranker reads them: every array of `recsys.features`, and the batches made of them.

Shapes: Q requests, R shown items, B requests of a batch, C candidates of each, T tasks, L length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
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
from recsys.features import Features, Field, ItemTable, Rate, gather
from recsys.history import Arrays, Histories, encode

FEATURES = "features.json"
CHUNK = 1024
"""Requests encoded at a time."""
MOMENTS = ("hour", "weekday")
"""Columns of a request that are always known."""
MISSING = 0
Ints = NDArray[np.int64]
Score = Callable[[Ints, Histories, Ints, Ints], NDArray[np.float32]]
"""Users, their paths, moments, and items [B, C] → the retriever's scores [B, C]."""


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
        return {
            "item_codes": items.codes,
            "item_numbers": items.numbers,
            "item_vectors": items.vectors,
            "item_raw": items.raw,
            "user_codes": self.user_codes,
            "user_numbers": self.user_numbers,
        }

    def save(self, folder: Path) -> None:
        """Write `features.json` and one `.npy` file a table: in a run as in a bundle."""
        folder.mkdir(exist_ok=True)
        write_json(folder / FEATURES, self.features.as_json())
        for name, array in self.arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Tables:
        """Read what `save` wrote."""
        features = Features.of_json(json.loads((folder / FEATURES).read_text()))
        names = ("item_codes", "item_numbers", "item_vectors", "item_raw")
        users = ("user_codes", "user_numbers")
        read = {n: np.load(folder / f"{n}.npy", allow_pickle=False) for n in (*names, *users)}
        items = ItemTable(*(read[name] for name in names))
        return cls(features, items, *(read[name] for name in users))


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
    retrieval: NDArray[np.float32] | None = None

    def requests(self, part: str) -> NDArray[np.int64]:
        """Return the requests of a part."""
        return np.arange(len(self.examples.users))[self.examples.parts[part]]

    def users_of(self, part: str) -> NDArray[np.int64]:
        """Return each shown item's user row: int64 [R]."""
        requests, offsets = self.requests(part), self.examples.offsets
        return np.repeat(self.examples.users[requests], np.diff(offsets)[requests])

    def with_retrieval(self, score: Score) -> Shown:
        """Return the same with a retriever's score of every shown item."""
        examples = self.examples
        found = np.zeros(len(examples.items), np.float32)
        for requests in chunks(len(examples.users)):
            rows_BC = grid(examples.offsets, requests)
            real_BC = rows_BC >= 0
            items_BC = np.where(real_BC, examples.items[rows_BC], 0)
            asked = (examples.users[requests], self.histories(requests), examples.times[requests])
            found[rows_BC[real_BC]] = score(*asked, items_BC)[real_BC]
        return replace(self, retrieval=found)

    def histories(self, requests: Ints) -> Histories:
        """Return the path before each request: the newest `length` events."""
        examples = self.examples
        return self.dataset.histories(
            examples.users[requests], examples.places[requests], self.length
        )

    def whole_histories(self, requests: Ints) -> Histories:
        """Return the whole path before each request."""
        return self.dataset.histories(self.examples.users[requests], self.examples.places[requests])

    def arrays(self, requests: Ints) -> Arrays:
        """Return everything that a ranker may read of some requests, and their `labels` [B, C, T].

        Where a request shows fewer items than others its row ends with item 0 and unknown labels.
        """
        examples, rows_BC = self.examples, grid(self.examples.offsets, requests)
        real_BC = rows_BC >= 0
        items_BC = np.where(real_BC, examples.items[rows_BC], 0)
        found = encode(self.histories(requests), self.length, examples.times[requests])
        found |= {name: values[requests] for name, values in self.request.items()}
        found |= gather(self.tables.items, items_BC, found["items"])
        if self.rates.shape[1]:
            found["item_numbers"][..., -self.rates.shape[1] :] = self.rates[rows_BC]
        if self.cross.shape[1]:
            found["cross_numbers"] = self.cross[rows_BC]
        if self.retrieval is not None:
            found["retrieval_scores"] = self.retrieval[rows_BC]
        labels_BCT = np.where(real_BC[..., None], examples.labels[rows_BC], np.nan)
        return found | {"labels": labels_BCT.astype(np.float32)}


def asked(
    tables: Tables,
    length: int,
    users: Ints,
    histories: Histories,
    now: Ints,
    items_BC: Ints,
    retrieval_BC: NDArray[np.float32],
) -> Arrays:
    """Return everything that a ranker may read of people who ask now, without any context."""
    kept, features = histories.last(length), tables.features
    found = encode(kept, length, now)
    user_codes, user_numbers = tables.user_codes[users + 1], tables.user_numbers[users + 1]
    found |= features.requests(user_codes, user_numbers, {}, now)
    found |= gather(tables.items, items_BC, found["items"])
    found |= features.crossed(kept, now, items_BC, tables.items)
    return found | {"retrieval_scores": retrieval_BC}


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
    """Learn declared columns from the item and user tables and the training part's context."""
    training = examples.parts["train"]
    context = {name: column[training] for name, column in examples.context.items()}
    return Features.fit(columns, dataset.items, dataset.users, context)


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
    return replace(tables, items=features.items(dataset.items, now))


def _read(rate: Rate, tables: Tables) -> tuple[NDArray[np.int32], str, float]:
    """Return the code of each item that a rate is by, its task and its prior."""
    return codes_of(rate.by, tables.features, tables.items), rate.task, rate.prior


def codes_of(name: str, features: Features, table: ItemTable) -> NDArray[np.int32]:
    """Return each item's code of a field: [N + 1]; `item_id` need not be declared."""
    place = 0
    for known in features.layout.item_codes:
        if known.name == name:
            return table.codes[:, place]
        place += known.width
    return np.arange(len(table.codes), dtype=np.int32)


def _crossed(shown: Shown) -> NDArray[np.float32]:
    examples, features = shown.examples, shown.tables.features
    width = len(features.layout.cross_numbers)
    found = np.zeros((len(examples.items), width), np.float32)
    for requests in chunks(len(examples.users)) if width else ():
        rows_BC = grid(examples.offsets, requests)
        real_BC = rows_BC >= 0
        arrays = features.crossed(
            shown.histories(requests),
            examples.times[requests],
            np.where(real_BC, examples.items[rows_BC], 0),
            shown.tables.items,
            examples.positions[rows_BC],
        )
        found[rows_BC[real_BC]] = arrays["cross_numbers"][real_BC]
    return found


def chunks(total: int, size: int = CHUNK) -> Iterator[NDArray[np.int64]]:
    """Return 0 to `total` - 1, so many at a time."""
    return (np.arange(start, min(start + size, total)) for start in range(0, total, size))


class ShownBatches(Batches):
    """`size` requests a batch with all that was shown at each.

    hidden: share of the training's requests whose context values are hidden, so that the model
    knows what to do where a request leaves them out. inputs: arrays that the model reads.
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
        super().__init__(dataset, size, seed)

    @property
    def total(self) -> int:
        """Training requests."""
        return len(self.training)

    def collate(self, rows: NDArray[np.int64], rng: np.random.Generator) -> Arrays:
        """Return the model's inputs and `labels`."""
        arrays = self.shown.arrays(self.training[rows])
        self._hide(arrays, rng.random(len(rows)) < self.hidden)
        return {name: as_model(arrays[name]) for name in (*self.inputs, "labels")}

    def _hide(self, arrays: Arrays, chosen_B: NDArray[np.bool_]) -> None:
        """Make a request's own context missing."""
        features = self.shown.tables.features
        given = [c.name for c in features.columns if c.of == "request" and c.kind not in MOMENTS]
        codes = _places(features.layout.request_codes, given)
        arrays["request_codes"][np.ix_(chosen_B, codes)] = MISSING
        numbers = np.array([n in given for n in features.layout.request_numbers], bool)
        arrays["request_numbers"][np.ix_(chosen_B, numbers)] = np.nan


def _places(fields: tuple[Field, ...], names: list[str]) -> NDArray[np.bool_]:
    """Return which places of a codes array belong to some fields."""
    return np.repeat([f.name in names for f in fields], [f.width for f in fields]).astype(bool)


def as_model(array: NDArray[Any]) -> NDArray[Any]:
    """Return indices as int64, as graphs read them; floats as they are."""
    return array if array.dtype.kind == "f" else array.astype(np.int64, copy=False)
