"""What goes over the wire where a caller asks why: the request, and reasons item by item."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from recsys.serving.messages import EventType, Id, Ignored, Person

MAX_EXPLAINED = 100
MAX_REASONS = 1_000


class ExplainRequest(Person, frozen=True, kw_only=True):
    """Ask why items score as they do for a person; the other fields are those of `RankRequest`.

    `by` is what of the person's path is taken away in turn: all events of one item, or of one
    category. Of an item the `reasons` that raise its score most are told.
    """

    items: Annotated[list[Id], Meta(min_length=1, max_length=MAX_EXPLAINED)]
    by: Literal["item", "category"] = "item"
    reasons: Annotated[int, Meta(ge=1, le=MAX_REASONS)] = 3


class Reason(Struct, frozen=True, omit_defaults=True):
    """Some events of the path, and how much lower the score would be had they not happened.

    `name` is an item's id, or a category. An `effect` below 0 lowers the score; it is left out
    where nothing could be compared, since without these events there is no path to score by.
    `last` is the newest event's moment, in milliseconds since 1970, where events have one.
    """

    name: str
    events: int
    event_types: list[EventType]
    effect: float | None = None
    last: int | None = None


class ExplainedItem(Struct, frozen=True, omit_defaults=True):
    """One item, its score as `/v1/rank` has it, and what that owes to the path and to the context.

    `context` holds that difference for every value of the request's context.
    """

    item_id: str
    score: float
    reasons: list[Reason]
    context: dict[str, float | None] = {}


class ExplainAnswer(Struct, frozen=True, omit_defaults=True):
    """Items in the order given, each with its reasons; other fields are those of `RankAnswer`."""

    items: list[ExplainedItem]
    source: Literal["model", "retrieval", "popular"]
    bundle: str
    timings_ms: dict[str, float]
    history_used: int = 0
    ignored: Ignored | None = None
    fallback: Literal["ranker"] | None = None
