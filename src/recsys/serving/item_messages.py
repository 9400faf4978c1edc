"""What goes over the wire about items that are added and removed while the server runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from recsys.serving.messages import Id

MAX_DIM = 65_536
MAX_LIKE = 1_000
MAX_LISTED = 10_000


class NewItem(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An item to answer with from now on; posted again, it takes the place of what was posted.

    Of an item that the bundle does not hold, say where it lies: by a `vector` of the bundle's own
    dimensions and encoder, by items that it is `like`, whose mean it then gets, or by both; the
    vector counts while the same encoder serves, and `like` after that. An item that the bundle
    holds keeps the bundle's vector; posted without either it is only no longer removed. `features`
    are columns of the item table, title and category among them. `bundle`, where given, is the one
    that the vector was made for: another champion refuses it.
    """

    item_id: Id
    vector: Annotated[list[float], Meta(min_length=1, max_length=MAX_DIM)] | None = None
    like: Annotated[list[Id], Meta(max_length=MAX_LIKE)] = []
    features: Annotated[dict[str, Any], Meta(max_length=1_000)] = {}
    bundle: str | None = None


class ItemAdded(Struct, frozen=True, omit_defaults=True):
    """An item was added, durably; `by` says what it is found by: the bundle's own vector, or else.

    `number` counts the changes of items; `ignored` are the `like` that the bundle does not know.
    """

    item_id: str
    by: Literal["vector", "like", "bundle"]
    number: int
    bundle: str
    ignored: list[str] = []


class ItemRemoved(Struct, frozen=True):
    """An item was removed, durably; `repeated` where it had been removed before."""

    item_id: str
    number: int
    repeated: bool


class ListedItem(Struct, frozen=True, omit_defaults=True):
    """One item's newest change, and what it means for the bundle that answers.

    added: found beside the index. removed: no answer has it. held: the bundle has the item itself.
    stale: its vector is of another encoder, and it names no like that the bundle knows.
    """

    item_id: str
    state: Literal["added", "removed", "held", "stale"]
    number: int
    moment: int
    by: str = ""


class ItemsQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The query string of `GET /v1/items`."""

    after: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_LISTED)] = 1_000


class ItemsAnswer(Struct, frozen=True):
    """Changes of items in their order, after the number asked for; `newest` is the last number."""

    bundle: str
    newest: int
    items: list[ListedItem]


class PrunedAnswer(Struct, frozen=True):
    """How many changes were forgotten: of items that the bundle holds, or removed without it."""

    forgotten: int
    left: int
