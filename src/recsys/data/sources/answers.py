"""A server's answers as impressions: what was shown, and what the events that name it say of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import ibis

from recsys.data.impressions import KEYS, LABELS, TAKEN
from recsys.data.sources.canonical import EARLIEST, LATEST, epoch_ms, first, number
from recsys.schema import DWELL, EVENT_TYPES

if TYPE_CHECKING:
    import ibis.expr.types as ir

NEEDED = ("answer_id", "user_id", "time", "source", "items")
SINCE = {
    "fallback": "string",
    "propensities": "array<float64>",
    "now": "int64",
    "context": "string",
}
"""Columns that older logs do not have."""
FEEDBACK = (*EVENT_TYPES, DWELL)
"""The labels of what was shown."""
CHOSEN = ("model", "retrieval", "popular")
"""The sources of answers that chose and ordered what they show."""
NAMES = 100
"""So many names of the context become columns, those that most answers say."""
LONGEST = 1e9
"""Seconds: nobody looks longer, so that such a value is none."""
MOST = 1 << 20
"""Above the number of items that any answer shows."""
FAMILIES = {
    "VARCHAR": "text",
    "BIGINT": "number",
    "UBIGINT": "number",
    "DOUBLE": "number",
    "BOOLEAN": "truth",
    "ARRAY": "texts",
}
"""What a value of JSON is to us; an object is nothing."""


@ibis.udf.scalar.builtin
def json_valid(text: str) -> bool:  # type: ignore[empty-body]
    """Whether text is JSON (DuckDB's own function, as the following)."""


@ibis.udf.scalar.builtin
def json_keys(text: str) -> list[str]:  # type: ignore[empty-body]
    """Names in an object."""


@ibis.udf.scalar.builtin
def json_type(text: str, pointer: str) -> str:  # type: ignore[empty-body]
    """Type of the value at a place, null where there is none."""


@ibis.udf.scalar.builtin
def json_extract_string(text: str, pointer: str) -> str:  # type: ignore[empty-body]
    """Value at a place, as text without quotes."""


@ibis.udf.scalar.builtin
def from_json(text: str, structure: str) -> list[str]:  # type: ignore[empty-body]
    """Values of a list."""


def shown_in(
    con: ibis.BaseBackend, answers: ir.Table, events: ir.Table, wait: int
) -> tuple[ir.Table | None, dict[str, int]]:
    """Return what was shown, None for nothing, and how many answers were left out and why.

    answers: NEEDED, SINCE and `row`, each answer once. events: sound ones, with `answer_id`. wait:
    milliseconds that an answer must be older than the newest event, for its outcome to be known.
    """
    named = events.filter(events.answer_id.notnull())
    if not first(named.select("answer_id")):
        return None, _some({"answers, for no event names one": number(answers.count())})
    judged = _judged(answers, number(epoch_ms(events.timestamp.cast("timestamp(6)")).max()) - wait)
    fit = judged.filter(judged.why.isnull())
    said, unread = _said(fit)
    places = {f"said_{place}": name for place, name in enumerate(said)}
    values = {place: _value(fit.context, name, said[name]) for place, name in places.items()}
    rows = _rows(fit.mutate(**values).select(*fit.columns, *values))
    labelled = _labelled(rows, _outcomes(named), places)
    # The order is in `row`: unordered, DuckDB needs less memory for it.
    con.raw_sql("SET preserve_insertion_order = false")
    kept = con.create_table("answers_shown", labelled, temp=True)
    left = _reasons(judged) | {"names of the context": unread}
    return (kept if first(kept.select("row")) else None), _some(left)


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in counts.items() if count}


def _judged(answers: ir.Table, known_until: int) -> ir.Table:
    """Add the moment asked, and `why` an answer is no use: null for one that is."""
    table = answers.mutate(asked=ibis.coalesce(answers.now, answers.time))
    object_ = json_valid(table.context) & table.context.lstrip().startswith("{")
    sensible = table.asked.between(EARLIEST * 1_000, LATEST * 1_000)
    why = ibis.cases(
        (table.answer_id.isnull() | (table.answer_id == ""), "answers without an id"),
        (table.fallback.notnull() | (table.source == "given"), "answers of a fallback"),
        (~table.source.isin(CHOSEN).fill_null(False), "answers of unknown source"),
        (~sensible.fill_null(False), "answers at impossible times"),
        (table.context.notnull() & ~object_, "answers whose context is no object"),
        (table.asked > known_until, "answers too new to have an outcome"),
    )
    return table.mutate(why=why)


def _reasons(judged: ir.Table) -> dict[str, int]:
    left = judged.filter(judged.why.notnull())
    rows = left.group_by("why").aggregate(answers=left.count()).order_by("why")
    return {row["why"]: row["answers"] for row in rows.to_pyarrow().to_pylist()}


def _said(answers: ir.Table) -> tuple[dict[str, str], int]:
    """Return name → what the contexts mostly hold under it, and how many names are not read.

    Those are names that a column cannot have, and the rarest beyond NAMES.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, kind, count in _types(answers):
        kinds = counts.setdefault(name, {})
        kinds[kind] = kinds.get(kind, 0) + count
    # DuckDB does not tell `Device` from `device`: the one that is said more often stays.
    by_lower: dict[str, str] = {}
    for name in sorted(counts, key=lambda name: (-sum(counts[name].values()), name)):
        if name and name.lower() not in (*KEYS, *TAKEN, *LABELS):
            by_lower.setdefault(name.lower(), name)
    read = sorted([*by_lower.values()][:NAMES])
    return {name: _family(counts[name]) for name in read}, len(counts) - len(read)


def _types(answers: ir.Table) -> Iterable[tuple[str, str, int]]:
    """Yield names of the context, a type of their values, and how many answers hold such."""
    said = answers.filter(answers.context.notnull()).select("context")
    pairs = said.mutate(name=json_keys(said.context)).unnest("name")
    pointer = "/" + pairs.name.replace("~", "~0").replace("/", "~1")
    types = pairs.select(
        "name",
        kind=json_type(pairs.context, pointer),
        within=json_type(pairs.context, pointer + "/0"),
    )
    lists = (types.kind == "ARRAY") & types.within.notnull() & (types.within != "VARCHAR")
    usable = types.filter(types.kind.isin([*FAMILIES]) & ~lists)
    counted = usable.group_by("name", "kind").aggregate(answers=usable.count())
    most = counted.order_by(counted.answers.desc(), "name", "kind").limit(10 * NAMES)
    for row in most.to_pyarrow().to_pylist():
        yield row["name"], row["kind"], row["answers"]


def _family(counts: Mapping[str, int]) -> str:
    """Return what most values are; numbers are whole where all of them are.

    >>> _family({"BIGINT": 3, "DOUBLE": 1, "VARCHAR": 2}), _family({"UBIGINT": 3, "VARCHAR": 2})
    ('number', 'whole')
    """
    sums: dict[str, int] = {}
    for kind, count in counts.items():
        sums[FAMILIES[kind]] = sums.get(FAMILIES[kind], 0) + count
    family = max(sorted(sums), key=lambda name: sums[name])
    return "whole" if family == "number" and "DOUBLE" not in counts else family


def _value(context: ir.Value, name: str, family: str) -> ir.Value:
    """Return what contexts hold under a name, null where that is of another family."""
    pointer = "/" + name.replace("~", "~0").replace("/", "~1")
    kinds = [
        kind for kind, own in FAMILIES.items() if own == ("number" if family == "whole" else family)
    ]
    text = ibis.ifelse(
        json_type(context, pointer).isin(kinds),
        json_extract_string(context, pointer),
        ibis.null("string"),
    )
    if family == "text":
        return text
    if family == "texts":
        return from_json(text, '["VARCHAR"]').filter(lambda one: one.notnull())
    if family == "truth":
        return text == "true"
    return _finite(text.try_cast("float64")) if family == "number" else text.try_cast("int64")


def _finite(numbers: ir.Value) -> ir.Value:
    return ibis.ifelse(numbers.isinf() | numbers.isnan(), ibis.null("float64"), numbers)


def _rows(answers: ir.Table) -> ir.Table:
    """Return a row an item, in its place, with the chance that it had of being there."""
    whole = answers.propensities.length() == answers["items"].length()
    flat = answers.mutate(
        chances=ibis.ifelse(whole, answers.propensities, ibis.null("array<float64>"))
    ).unnest("items", offset="place")
    chance = flat.chances[flat.place]
    sound = (chance > 0) & (chance <= 1)
    return flat.mutate(chance=ibis.ifelse(sound, chance, ibis.null("float64")))


def _outcomes(events: ir.Table) -> ir.Table:
    """Return what events say of each item of each answer; whatever was done implies a view."""
    kinds = {kind: (events.event_type == kind).any() for kind in EVENT_TYPES[1:]}
    looked = (events.event_type == EVENT_TYPES[0]) & events.value.between(0, LONGEST)
    # A view may be reported at its start and again at its end.
    return events.group_by("answer_id", "item_id").aggregate(
        view=ibis.literal(True), **kinds, dwell=events.value.max(where=looked)
    )


def _labelled(rows: ir.Table, outcomes: ir.Table, places: Mapping[str, str]) -> ir.Table:
    """Return rows with labels, and the context under its own names."""
    theirs = outcomes.rename(of_answer="answer_id", of_item="item_id")
    met = rows.left_join(
        theirs, (rows.answer_id == theirs.of_answer) & (rows["items"] == theirs.of_item)
    )
    flags = {kind: met[kind].fill_null(False).cast("float32") for kind in EVENT_TYPES}
    return met.select(
        user_id=met.user_id,
        item_id=met["items"],
        timestamp=met.asked,
        request_id=met.answer_id,
        position=met.place.cast("int32"),
        propensity=met.chance,
        row=met.row * MOST + met.place,
        **flags,
        dwell=met.dwell.cast("float32"),
        **{name: met[place] for place, name in places.items()},
    )
