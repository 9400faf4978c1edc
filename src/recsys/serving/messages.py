"""What goes over the wire: requests with their limits, answers, and errors that help."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from recsys.schema import EVENT_TYPES, InputError, suggestion
from recsys.serving.settings import MAX_HISTORY, MAX_K

MAX_BATCH = 256
MAX_EVENTS = 10_000
MAX_CANDIDATES = 10_000
SECONDS_UNTIL = 100_000_000_000
"""Numbers below this are seconds (until the year 5138), from here on milliseconds (from 1973)."""
LAST_MOMENT = 253_402_300_799_999
"""The end of the year 9999, in milliseconds since 1970."""

Id = Annotated[str, Meta(min_length=1, max_length=1_000)]
Moment = Annotated[
    int | float | str,
    Meta(description="Seconds or milliseconds since 1970, or ISO 8601 text (UTC unless it says)"),
]
EventType = Literal["view", "favourite", "cart", "purchase"]
Arm = Literal["champion", "challenger"]
Share = Annotated[
    float,
    Meta(ge=0, le=1, description="0: what the history is about all along; 1: its newest turn"),
]
K = Annotated[int, Meta(ge=1, le=MAX_K, description="How many items to answer with")]
Boost = Annotated[float, Meta(ge=-1_000, le=1_000)]
Context = Annotated[
    dict[str, Any],
    Meta(
        max_length=100,
        description="What the bundle's ranker reads of the request itself, by name: a text, a "
        "number, a truth value or a list of texts; what is left out, or null, counts as missing",
    ),
]


class HistoryEvent(Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that a person did with an item; `value` as in an event that is posted."""

    item_id: Id
    event_type: EventType = "view"
    timestamp: Moment | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        if self.timestamp is not None:
            milliseconds(self.timestamp)


class Weights(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an answer is to lean to; what is left out, the model weighs itself.

    `tasks` takes the place of the ranker's own blend: an item's score is the sum of what the ranker
    says of each task, times its weight, and a task that is left out has none.
    """

    recency: Share | None = None
    tasks: Annotated[dict[str, Boost], Meta(max_length=100)] = {}


class Boosts(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is added to the scores of items, by their ids or by their categories."""

    items: Annotated[dict[Id, Boost], Meta(max_length=10_000)] = {}
    categories: Annotated[dict[str, Boost], Meta(max_length=10_000)] = {}


class RecommendRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ask for items: by `user_id`, by `history` (oldest first), or by neither for a newcomer.

    A `history` takes the place of the one stored for `user_id`, of whom the model then uses only
    what else it knows. Plain item ids in a history are views. An answer that is not ready after
    `deadline_ms` is the popular items instead, and says so. `diversity` is how much the difference
    from the items above counts beside the score; `explore`, how often a place goes to an item drawn
    from those that were ranked lower (left out: as the server is set).
    """

    user_id: Id | None = None
    history: Annotated[list[Id | HistoryEvent], Meta(max_length=MAX_HISTORY)] | None = None
    k: K = 10
    exclude_seen: bool = True
    exclude_items: Annotated[list[Id], Meta(max_length=MAX_HISTORY)] = []
    allow_categories: Annotated[list[str], Meta(max_length=10_000)] | None = None
    deny_categories: Annotated[list[str], Meta(max_length=10_000)] = []
    max_per_category: Annotated[int, Meta(ge=1, le=MAX_K)] | None = None
    boosts: Boosts = Boosts()
    now: Moment | None = None
    weights: Weights = Weights()
    deadline_ms: Annotated[float, Meta(gt=0, le=60_000)] | None = None
    context: Context = {}
    diversity: Annotated[float, Meta(ge=0, le=1)] = 0.0
    explore: Annotated[float, Meta(ge=0, le=1)] | None = None

    def __post_init__(self) -> None:
        if self.now is not None:
            milliseconds(self.now)


class Person(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Whom a request about some items is for; the fields are those of `RecommendRequest`."""

    user_id: Id | None = None
    history: Annotated[list[Id | HistoryEvent], Meta(max_length=MAX_HISTORY)] | None = None
    context: Context = {}
    weights: Weights = Weights()
    now: Moment | None = None

    def __post_init__(self) -> None:
        if self.now is not None:
            milliseconds(self.now)

    def person(self) -> RecommendRequest:
        """Return what a recommendation would be asked with, but for the items."""
        return RecommendRequest(
            user_id=self.user_id,
            history=self.history,
            exclude_seen=False,
            now=self.now,
            weights=self.weights,
            context=self.context,
        )


class RankRequest(Person, frozen=True, kw_only=True):
    """Have your own items ranked for a person; the other fields are those of `RecommendRequest`.

    Items named twice count once. Without `k` all are answered with. An answer that is not ready
    after `deadline_ms` is the items in the order given, and says so.
    """

    items: Annotated[list[Id], Meta(min_length=1, max_length=MAX_CANDIDATES)]
    k: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)] | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=60_000)] | None = None


class RecommendBatch(Struct, frozen=True, forbid_unknown_fields=True):
    """Several requests answered together, in their order."""

    requests: Annotated[list[RecommendRequest], Meta(min_length=1, max_length=MAX_BATCH)]


class Event(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing that a person did, as the shop reports it.

    Posting the same `event_id` again changes nothing; without one, every post is a new event. An
    event without a `timestamp` happened now. `value` is what `recsys prepare` reads under that name
    (dwell seconds, rating, price); `answer_id` names the answer that showed the item.
    """

    user_id: Id
    item_id: Id
    event_id: Id | None = None
    event_type: EventType = "view"
    timestamp: Moment | None = None
    value: float | None = None
    answer_id: Id | None = None

    def __post_init__(self) -> None:
        if self.timestamp is not None:
            milliseconds(self.timestamp)


class SimilarQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The query string of `/v1/similar`."""

    k: K = 10


class Recommended(Struct, frozen=True, omit_defaults=True):
    """One item of an answer; title and category where the bundle has them.

    `propensity` is how probable it was that this item stood at this place, where the answer
    explores.
    """

    item_id: str
    score: float
    title: str | None = None
    category: str | list[str] | None = None
    propensity: float | None = None


class Ignored(Struct, frozen=True):
    """What a request named that the bundle does not know: how many, and the first few."""

    items: int
    first_items: list[str]
    categories: list[str]


class Answer(Struct, frozen=True, omit_defaults=True):
    """Recommended items, best first, and where they come from.

    `source` is "model" where a history was read or a ranker chose, and "popular" where neither, and
    `score` is then the number of events. `history_used` counts the events that the model read, and
    `path` is their checksum: equal where the same events were read. `timings_ms` holds each stage's
    milliseconds, for all answers of a batch together. Events that follow from the answer name its
    `answer_id`. `arm` says which of two models on trial answered, and `fallback` what failed: the
    "deadline" (these are popular items) or the "ranker" (these are as retrieval orders them).
    """

    items: list[Recommended]
    source: Literal["model", "popular"]
    bundle: str
    timings_ms: dict[str, float]
    history_used: int = 0
    ignored: Ignored | None = None
    answer_id: str = ""
    arm: Arm = "champion"
    fallback: Literal["deadline", "ranker"] | None = None
    path: int = 0


class AnswerBatch(Struct, frozen=True):
    """One answer a request, in the requests' order."""

    answers: list[Answer]


class RankedItem(Struct, frozen=True, omit_defaults=True):
    """One of a caller's items: its score, and what the ranker says of each task.

    A probability, or of `dwell` the seconds to expect.
    """

    item_id: str
    score: float | None = None
    probabilities: dict[str, float] = {}


class RankAnswer(Struct, frozen=True, omit_defaults=True):
    """A caller's own items, best first; the fields are those of `Answer`.

    `source` is "model" where the bundle's ranker scored them, "retrieval" where there is none and
    the score is the one that retrieval orders by, "popular" where there is no history for that
    either and it is the number of events, and "given" where the deadline was missed: the items are
    in the order given, without scores. Items that the bundle does not know are in `ignored` alone.
    """

    items: list[RankedItem]
    source: Literal["model", "retrieval", "popular", "given"]
    bundle: str
    timings_ms: dict[str, float]
    history_used: int = 0
    ignored: Ignored | None = None
    answer_id: str = ""
    arm: Arm = "champion"
    fallback: Literal["deadline", "ranker"] | None = None
    path: int = 0


class SimilarAnswer(Struct, frozen=True):
    """Items nearest to one item, best first."""

    item_id: str
    items: list[Recommended]
    bundle: str
    timings_ms: dict[str, float]


class ItemAnswer(Struct, frozen=True):
    """What the bundle knows about one item."""

    item_id: str
    count: int
    features: dict[str, Any]
    bundle: str


class Refused(Struct, frozen=True):
    """One event of a post that was not taken: its place from 0, a word and a sentence."""

    place: int
    code: str
    message: str


class EventsAnswer(Struct, frozen=True, omit_defaults=True):
    """What became of posted events: taken and durable, known already, or refused.

    `unknown_items` counts events taken whose item the bundle does not know: they are kept for the
    next training, and no answer uses them until then.
    """

    accepted: int
    repeated: int = 0
    unknown_items: int = 0
    refused: list[Refused] = []


class KeptEvent(Struct, frozen=True, omit_defaults=True):
    """One event kept of a user; `timestamp` in milliseconds since 1970."""

    item_id: str
    event_type: EventType
    timestamp: int
    event_id: str
    value: float | None = None
    answer_id: str | None = None


class UserAnswer(Struct, frozen=True, omit_defaults=True):
    """What the server keeps of a user: posted events, oldest first; the bundle's are counted."""

    user_id: str
    events: list[KeptEvent]
    bundle_events: int = 0
    erased_before: int | None = None


class ErasedAnswer(Struct, frozen=True):
    """What was erased of a user: posted events, and rows of the event and answer logs."""

    user_id: str
    events: int
    log_rows: int


class Status(Struct, frozen=True, omit_defaults=True):
    """The state of the process."""

    status: Literal["ok", "ready", "starting", "stopping"]
    bundle: str | None = None


class Problem(Struct, frozen=True):
    """Why a request was refused: a word for programs and a sentence for people."""

    code: str
    message: str


class ErrorAnswer(Struct, frozen=True):
    """The body of every 4xx and 5xx answer."""

    error: Problem


class MalformedJSON(InputError):
    """A body that is not JSON at all."""


Message = TypeVar("Message")


def milliseconds(moment: int | float | str) -> int:
    """Return a moment as milliseconds since 1970; raise InputError where it is none.

    >>> milliseconds(1_700_000_000), milliseconds(1_700_000_000_000)
    (1700000000000, 1700000000000)
    >>> milliseconds("2023-11-14T22:13:20Z")
    1700000000000
    """
    value = _iso_milliseconds(moment) if isinstance(moment, str) else moment
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{moment!r} is not a moment")
    if not isinstance(moment, str) and abs(value) < SECONDS_UNTIL:
        value = value * 1000
    if not 0 <= value <= LAST_MOMENT:
        raise InputError(f"{moment!r} is not a moment between the years 1970 and 9999")
    return int(value)


def moment(milliseconds: int | None) -> float | None:
    """Return a moment as a request gives it: milliseconds from before 1973 pass for seconds."""
    if milliseconds is None or milliseconds >= SECONDS_UNTIL:
        return milliseconds
    return (milliseconds + 0.5) / 1000  # half a millisecond, which is cut off again


def _iso_milliseconds(text: str) -> float:
    try:
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1000
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{text[:40]!r} is not a moment; expected seconds or milliseconds since 1970, or ISO "
            "8601 text such as 2025-03-01T12:30:00Z"
        ) from error


def decoded(decoder: msgspec.json.Decoder[Message], body: bytes | bytearray) -> Message:
    """Decode a JSON body, or raise InputError saying what is wrong with it and where.

    >>> decoded(msgspec.json.Decoder(RecommendRequest), b'{"exclud_seen": true}')
    Traceback (most recent call last):
    recsys.schema.InputError: unknown field 'exclud_seen'; did you mean 'exclude_seen'?
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InputError(explained(str(error), decoder.type)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        met = "the body is empty" if not body.strip() else f"the body is not JSON: {error}"
        raise MalformedJSON(f'{met}; expected an object such as {{"user_id": "u1"}}') from error


def converted(values: dict[str, str], kind: type[Message]) -> Message:
    """Turn a query string's values into the Struct `kind`, or raise InputError as `decoded` does.

    >>> converted({"k": "5"}, SimilarQuery)
    SimilarQuery(k=5)
    """
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(explained(str(error), kind)) from error


def explained(message: str, root: type) -> str:
    """Return a validation message in the words of a request: what was met, where, what to type.

    `root` is what the whole message was read as: a Struct, or a list of one kind of Struct.

    >>> explained("Invalid enum value 'vew' - at `$.history[0].event_type`", RecommendRequest)
    "history[0].event_type: unknown event type 'vew'; did you mean 'view'?"
    """
    text, _, path = message.partition(" - at `$")
    place = path.rstrip("`").lstrip(".")
    return (f"{place}: " if place else "") + _reworded(text, place, _struct_at(place, root))


def _struct_at(place: str, root: type) -> type:
    """Return the Struct at a place of a message: the root, one of a list, or one in a field."""
    if re.search(r"history\[\d+\]$", place):
        return HistoryEvent
    if place.startswith("["):
        root = get_args(root)[0]
    owner = RecommendRequest if place.startswith("requests[") else root
    hint = get_type_hints(owner).get(place.rpartition(".")[2])
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Struct)), owner)


def _reworded(text: str, place: str, struct: type) -> str:
    if field := re.search(r"unknown field `(.*)`", text):
        return _unknown("field", field[1], struct.__struct_fields__)  # type: ignore[attr-defined]
    if value := re.search(r"Invalid enum value '(.*)'", text):
        name = place.rpartition(".")[2]
        known = EVENT_TYPES if name == "event_type" else get_args(get_type_hints(struct).get(name))
        return _unknown(name.replace("_", " "), value[1], known)
    return text[:1].lower() + text[1:].replace("`", "")


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    hint = suggestion(name[:60], known) or f"; expected one of {', '.join(known)}"
    return f"unknown {what} {name[:60]!r}{hint}"
