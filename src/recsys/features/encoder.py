"""The declared columns as arrays: one encoder for preparing, training, exporting and serving.

Shapes: B requests, C candidates, N items, U users, R rows of a table, W codes, G numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.features import against_path, learnt
from recsys.features.against_path import Compared, Past, Shared
from recsys.features.columns import CODED, Column, declare
from recsys.features.context import context_lists, context_numbers, context_texts, wire
from recsys.features.layout import Field, ItemTable, Layout, Rate
from recsys.features.learnt import FIRST, MISSING, OTHER, Scale, Vocabulary
from recsys.features.transitions import Transition, log_share
from recsys.history import Arrays, Histories, request_clock
from recsys.schema import InputError, suggestion

ARROW = (pa.Array, pa.ChunkedArray)
CLOCK = {"hour": 24, "weekday": 7}
VERSION = 1

Encoder = Vocabulary | Scale | None


class Features:
    """Declared columns with what was learnt of them: vocabularies, edges, means.

    Everything here is a pure function of its inputs; `as_json` and `of_json` carry it whole.

    >>> items = pa.table({"brand": ["Oak", "Wren", "Oak"], "price": [2.0, 4.0, None]})
    >>> declared = {
    ...     "brand": {"of": "item", "kind": "categorical"},
    ...     "price": {"of": "item", "kind": "numeric"},
    ... }
    >>> features = Features.fit(declared, items, pa.table({}), {})
    >>> table = features.items(items, {})
    >>> table.codes.ravel(), table.numbers.ravel()
    (array([0, 2, 3, 2], dtype=int32), array([nan, -1.,  1., nan], dtype=float32))
    """

    def __init__(self, columns: tuple[Column, ...], facts: Mapping[str, Mapping[str, Any]]) -> None:
        self.columns = columns
        self.facts = facts
        self._encoders = {column.name: _encoder(column, facts[column.name]) for column in columns}

    @classmethod
    def fit(
        cls,
        columns: Mapping[str, Mapping[str, Any] | None],
        items: pa.Table,
        users: pa.Table,
        context: Mapping[str, pa.Array],
    ) -> Features:
        """Learn vocabularies and scales; `context` holds training requests alone.

        columns: name → options, as in configs/features/*.yaml; items: row i - 1 is item i; users:
        row u is user u. Raises InputError for a wrong declaration or a column that does not fit it.
        """
        declared = declare(columns)
        sources = {"item": items, "user": users, "request": context}
        return cls(declared, {c.name: _learn(c, sources.get(c.of)) for c in declared})

    @property
    def collisions(self) -> dict[str, str]:
        """Return of each hashed column, by name, how its values share codes, as a sentence."""
        return {
            c.name: f"{self.facts[c.name]['distinct']:,} values share {c.hash:,} codes; "
            f"{self.facts[c.name]['shared']:,} have another's"
            for c in self.columns
            if c.hash
        }

    @cached_property
    def layout(self) -> Layout:
        """Fields and columns in the order declared; in a request's arrays, users' come first."""
        return Layout(
            request_codes=self._fields("user") + self._fields("request"),
            request_numbers=self._numeric("user") + self._numeric("request"),
            item_codes=self._fields("item"),
            item_numbers=self._numeric("item") + tuple(rate.name for rate in self.rates),
            cross_numbers=tuple(c.name for c in self._crossed),
            vector_width=sum(int(self.facts[c.name]["width"]) for c in self._of("item", "vector")),
        )

    @cached_property
    def context_names(self) -> tuple[str, ...]:
        """Names that a request's `context` may hold."""
        read = [c.source for c in self._of("request", *CODED, "numeric")]
        return tuple(dict.fromkeys(read))

    @cached_property
    def rates(self) -> tuple[Rate, ...]:
        """The statistics of the log that `items` and `log_numbers` want, in their order."""
        of_log = self._of("log", "rate")
        return tuple(Rate(c.name, str(c.by), str(c.task), c.prior) for c in of_log)

    @cached_property
    def transitions(self) -> tuple[Transition, ...]:
        """What is to be known of what came next, in the order of `ItemTable.transitions`."""
        declared = self._of("path", "transition")
        return tuple(Transition(c.name, c.by, c.prior) for c in declared)

    @cached_property
    def least_met(self) -> int:
        """How often training must have met an item that is to have a code of its own."""
        return next((c.least for c in self._of("item", "categorical") if c.is_index), 1)

    @cached_property
    def raw_names(self) -> tuple[str, ...]:
        """Item columns that are compared with the path's, in the order of `ItemTable.raw`."""
        return tuple(dict.fromkeys(str(c.by) for c in self._of("path", "ratio")))

    def items(
        self,
        table: pa.Table,
        rates: Mapping[str, NDArray[np.floating]],
        unmet: NDArray[np.bool_] | None = None,
    ) -> ItemTable:
        """Encode the item table; `rates`: each log column's values [N + 1], NaN where unknown.

        Items that training has met too seldom, `unmet` [N + 1], share one code as an index.
        """
        rows = table.num_rows + 1
        static = [self._scaled(c, table) for c in self._of("item", "numeric")]
        vectors = [self._vector(c, table) for c in self._of("item", "vector")]
        raw = [self._values(self._named(name), table) for name in self.raw_names]
        return ItemTable(
            codes=_unmet(self._codes("item", table), self.layout, unmet),
            numbers=np.concatenate(
                [_columns(static, rows, np.float32), self.log_numbers(rates, rows)], axis=1
            ),
            vectors=np.concatenate([np.zeros((rows, 0), np.float32), *vectors], axis=1),
            raw=_columns(raw, rows, np.float64),
        )

    def log_numbers(
        self, rates: Mapping[str, NDArray[np.floating]], rows: int
    ) -> NDArray[np.float32]:
        """Return the last columns of `item_numbers`: the log of each rate, NaN where unknown.

        rates: name → [rows] for each of `self.rates`; rates under 1e-6 count as that.
        """
        logs = [log_share(rates[rate.name]) for rate in self.rates]
        return _columns(logs, rows, np.float32)

    def codes_of(self, name: str | None, table: ItemTable) -> NDArray[np.int32]:
        """Return each item's code of a field: [N + 1]; `item_id` need not be declared.

        Of no field, one and the same for all items.
        """
        place = 0
        if name is None:
            return np.append(MISSING, np.full(len(table.codes) - 1, FIRST)).astype(np.int32)
        for known in self.layout.item_codes:
            if known.name == name:
                return table.codes[:, place]
            place += known.width
        return np.arange(len(table.codes), dtype=np.int32)

    def users(self, table: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Encode the user table: codes [U + 1, W] and numbers [U + 1, G]; row 0 is unknown.

        User u is row u + 1.
        """
        numbers = [self._scaled(c, table) for c in self._of("user", "numeric")]
        return self._codes("user", table), _columns(numbers, table.num_rows + 1, np.float32)

    def requests(
        self,
        user_codes_BW: NDArray[np.integer],
        user_numbers_BG: NDArray[np.floating],
        context: Mapping[str, Sequence[Any] | pa.Array],
        now_B: NDArray[np.int64],
    ) -> Arrays:
        """Return `request_codes` int64 [B, W] and `request_numbers` float32 [B, G].

        user_*: rows of what `users` returned; context: name → B values, an Arrow array or plain
        ones as they come in a request, of a multi-valued column B lists; a name that is left out is
        missing in all B; now_B: milliseconds. Raises InputError for a wrong value, or a name that a
        request may not hold; a log's columns (Arrow) may be more than are declared.
        """
        self._check_names(context)
        batch, clock = len(now_B), request_clock(now_B)
        assert all(len(values) == batch for values in context.values()), "one value a request"
        coded = [self._request_codes(c, context, clock) for c in self._coded("request")]
        codes = [code_B for places in coded for code_B in places]
        numbers = [self._request_numbers(c, context, batch) for c in self._of("request", "numeric")]
        return {
            "request_codes": np.concatenate(
                [user_codes_BW, _columns(codes, batch, np.int64)], axis=1, dtype=np.int64
            ),
            "request_numbers": np.concatenate(
                [user_numbers_BG, _columns(numbers, batch, np.float32)], axis=1, dtype=np.float32
            ),
        }

    def crossed(
        self,
        histories: Histories,
        now_B: NDArray[np.int64],
        candidates_BC: NDArray[np.integer],
        table: ItemTable,
        positions_BC: NDArray[np.integer] | None = None,
    ) -> Arrays:
        """Return `cross_numbers` float32 [B, C, G]: the candidates against each path, as of `now`.

        count: log(1 + events before `now` that share a value with the candidate), a shared value
        of a multi-valued field counting each; since: log(1 + seconds) since the newest, NaN for
        none; ratio: log of the candidate's value over the mean of the path's positive ones;
        transition: log of the share that the candidate has of what came next after the path's
        newest event of its value, NaN for none; position: log(1 + place), 0 where none is given.
        Rare and missing values are not shared.
        """
        past = Past.of(histories, now_B)
        shared = Shared.of(past, candidates_BC, table.codes, self._compared)
        transitions = iter(table.transitions)
        cross_BCG = np.empty((*candidates_BC.shape, len(self._crossed)), np.float32)
        for place, column in enumerate(self._crossed):
            if column.kind == "position":
                number_BC = against_path.positions(positions_BC, candidates_BC.shape)
            elif column.kind == "transition":
                args = past, candidates_BC, shared.last((column.by, None)), next(transitions)
                number_BC = against_path.transition(*args, now_B)
            elif column.kind == "ratio":
                raw, read = table.raw[:, self._raw_place(column)], past.only(column.event)
                number_BC = against_path.ratio(read, raw[candidates_BC], raw[read.items])
            else:
                number = shared.count if column.kind == "count" else shared.since
                number_BC = number((column.by, column.event))
            cross_BCG[..., place] = number_BC
        return {"cross_numbers": cross_BCG}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "version": VERSION,
            "columns": {column.name: column.as_json() for column in self.columns},
            "learnt": {name: dict(facts) for name, facts in self.facts.items()},
        }

    @classmethod
    def of_json(cls, facts: Mapping[str, Any]) -> Features:
        """Return what `as_json` wrote; raise InputError for what another version wrote."""
        if facts.get("version") != VERSION:
            raise InputError(
                f"features.json is of version {facts.get('version')}, expected {VERSION}; train "
                "again, or use the version of recsys that wrote it"
            )
        return cls(declare(facts["columns"]), facts["learnt"])

    @cached_property
    def _crossed(self) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if column.of in ("path", "shown"))

    def _of(self, of: str, *kinds: str) -> list[Column]:
        return [column for column in self.columns if column.of == of and column.kind in kinds]

    def _named(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def _coded(self, of: str) -> list[Column]:
        return self._of(of, *CODED, *CLOCK)

    def _numeric(self, of: str) -> tuple[str, ...]:
        return tuple(column.name for column in self._of(of, "numeric"))

    def _fields(self, of: str) -> tuple[Field, ...]:
        return tuple(Field(c.name, self._size(c), c.width) for c in self._coded(of))

    def _size(self, column: Column) -> int:
        if column.kind in CLOCK:
            return FIRST + CLOCK[column.kind]
        if column.is_index:
            return int(self.facts[column.name]["size"])
        return self._vocabulary(column).size

    def _vocabulary(self, column: Column) -> Vocabulary:
        encoder = self._encoders[column.name]
        assert isinstance(encoder, Vocabulary)
        return encoder

    def _scale(self, column: Column) -> Scale:
        encoder = self._encoders[column.name]
        assert isinstance(encoder, Scale)
        return encoder

    def _codes(self, of: str, table: pa.Table) -> NDArray[np.int32]:
        """Encode the coded columns of a table, after a row of missing values: int32 [R + 1, W]."""
        rows = table.num_rows + 1
        parts = [self._column_codes(column, table, rows) for column in self._of(of, *CODED)]
        return np.concatenate([np.zeros((rows, 0), np.int32), *parts], axis=1)

    def _column_codes(self, column: Column, table: pa.Table, rows: int) -> NDArray[np.int32]:
        if column.is_index:
            code = np.arange(rows, dtype=np.int32) + OTHER
            code[0] = MISSING if column.of == "item" else OTHER
            return np.where(code < self._size(column), code, OTHER)[:, None]
        array = learnt.read_column(column, table, f"{column.of}s")
        return self._array_codes(column, _with_unknown(array))

    def _array_codes(self, column: Column, array: pa.Array) -> NDArray[np.int32]:
        """Return the codes of values that are an Arrow array: [R, width]."""
        vocabulary = self._vocabulary(column)
        if column.kind == "categorical":
            return vocabulary.codes(learnt.as_texts(column, array))[:, None]
        owners, texts = learnt.as_value_lists(column, array)
        return _side_by_side(owners, vocabulary.codes(texts), (len(array), column.width))

    def _plain_codes(self, column: Column, values: Sequence[Any]) -> Iterable[Any]:
        """Return the codes of values as they come in requests, place by place: [B] each."""
        vocabulary, kind = self._vocabulary(column), self.facts[column.name]["wire"]
        if column.kind == "categorical":
            return [[vocabulary.code(text) for text in context_texts(column.source, values, kind)]]
        lists = _plain_lists(column, values, kind)
        codes = np.array([vocabulary.code(text) for texts in lists for text in texts], np.int32)
        lengths = np.array([len(texts) for texts in lists], np.int64)
        owners = np.repeat(np.arange(len(lists)), lengths)
        return _side_by_side(owners, codes, (len(lists), column.width)).T

    def _values(self, column: Column, table: pa.Table) -> NDArray[np.float64]:
        """Return a numeric column, missing ones filled by its default, after a missing row."""
        array = _with_unknown(learnt.read_column(column, table, f"{column.of}s"))
        return self._scale(column).filled(learnt.as_numbers(column, array))

    def _scaled(self, column: Column, table: pa.Table) -> NDArray[np.float32]:
        return self._scale(column).numbers(self._values(column, table))

    def _vector(self, column: Column, table: pa.Table) -> NDArray[np.float32]:
        array = _with_unknown(learnt.read_column(column, table, "items"))
        return learnt.as_vectors(column, array, int(self.facts[column.name]["width"]))

    def _check_names(self, context: Mapping[str, Any]) -> None:
        for name, values in context.items():
            if name not in self.context_names and not isinstance(values, ARROW):
                raise InputError(
                    f"context.{name}: no such feature; known: "
                    f"{', '.join(self.context_names) or 'none'}"
                    + suggestion(str(name), self.context_names)
                )

    def _request_codes(
        self, column: Column, context: Mapping[str, Any], clock: Arrays
    ) -> Iterable[Any]:
        """Return a column's codes place by place, as many as it is wide: [B] each."""
        if column.kind in CLOCK:
            return [clock[f"request_{column.kind}"] + FIRST]
        values, batch = context.get(column.source), len(clock["request_hour"])
        if values is None:
            return np.full((column.width, batch), self._vocabulary(column).code(None))
        if isinstance(values, ARROW):
            return self._array_codes(column, learnt.read_column(column, context, "requests")).T
        return self._plain_codes(column, values)

    def _request_numbers(
        self, column: Column, context: Mapping[str, Any], batch: int
    ) -> NDArray[np.float32]:
        values = context.get(column.source)
        if values is None:
            value_B = np.full(batch, np.nan)
        elif isinstance(values, ARROW):
            value_B = learnt.as_numbers(column, learnt.read_column(column, context, "requests"))
        else:
            value_B = context_numbers(column.source, values, self.facts[column.name]["wire"])
        return self._scale(column).numbers(value_B)

    @cached_property
    def _compared(self) -> Compared:
        """What path columns read of an item's codes."""
        ends = np.cumsum([0] + [field.width for field in self.layout.item_codes]).tolist()
        fields = zip(self.layout.item_codes, ends, strict=False)
        columns = {f.name: (slice(at, at + f.width), f.size) for f, at in fields}
        read = [c for c in self._crossed if c.kind in ("count", "since", "transition")]
        return Compared.of([(column.by, column.event) for column in read], columns)

    def _raw_place(self, column: Column) -> int:
        return self.raw_names.index(str(column.by))


def _learn(column: Column, source: Any) -> dict[str, Any]:
    """Return what a column's encoder needs to know, as plain JSON values."""
    if column.is_index:
        return {"size": source.num_rows + FIRST}
    if column.kind not in (*CODED, "numeric", "vector"):
        return {}
    array = learnt.read_column(column, source, f"{column.of}s")
    if column.kind == "vector":
        return {"width": learnt.as_vectors(column, array).shape[1]}
    if column.kind == "numeric":
        scale = learnt.learn_scale(column, learnt.as_numbers(column, array))
        return {"wire": wire(array.type)} | scale
    if column.kind == "categorical":
        texts = learnt.as_texts(column, array)
    else:
        _, texts = learnt.as_value_lists(column, array)
    kind = wire(array.type.value_type if column.kind == "multi" else array.type)
    found = {"wire": kind, "values": learnt.learn_values(column, texts)}
    return found | (learnt.learn_collisions(column, texts) if column.hash else {})


def _plain_lists(column: Column, values: Sequence[Any], kind: str) -> list[list[str]]:
    """Return the values of each request: of a list, or the words of a text."""
    if column.kind == "multi":
        return context_lists(column.source, values, kind)
    return [learnt.words(text or "") for text in context_texts(column.source, values, kind)]


def _encoder(column: Column, facts: Mapping[str, Any]) -> Encoder:
    if column.kind == "numeric":
        return Scale(column, facts)
    if column.kind in CODED and not column.is_index:
        return Vocabulary(column, facts["values"])
    return None


def _unmet(
    codes_NW: NDArray[np.int32], layout: Layout, unmet: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    if unmet is not None and layout.item_index is not None:
        codes_NW[unmet, layout.item_index] = OTHER
    return codes_NW


def _with_unknown(array: pa.Array) -> pa.Array:
    """Put a missing value first: what is known of an unknown item or user."""
    return pa.concat_arrays([pa.nulls(1, array.type), array])


def _columns(parts: Sequence[Any], rows: int, dtype: type) -> NDArray[Any]:
    """Stand columns side by side: [rows, G], also where there are none."""
    grid: NDArray[Any] = np.empty((rows, len(parts)), dtype)
    for place, part in enumerate(parts):
        grid[:, place] = part
    return grid


def _side_by_side(
    owners: NDArray[np.int64], codes: NDArray[np.int32], shape: tuple[int, int]
) -> NDArray[np.int32]:
    """Lay each row's first distinct codes into its places, the rest is missing (0)."""
    _, first = np.unique(owners * (codes.max(initial=0) + 1) + codes, return_index=True)
    first.sort()
    owners, codes = owners[first], codes[first]
    place = np.arange(len(owners)) - np.searchsorted(owners, owners)
    kept = place < shape[1]
    grid: NDArray[np.int32] = np.full(shape, MISSING, np.int32)
    grid[owners[kept], place[kept]] = codes[kept]
    return grid
