"""The routes of items that are added and removed while the server runs.

A change is in the users' state when it is answered, so that every worker and replica sees it with
its next answer (through Redis within a tenth of a second), and a restart forgets none.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from recsys.schema import InputError, suggestion
from recsys.serving.asgi import Reply, Request, Route, reply
from recsys.serving.catalogue import CATEGORY_COLUMNS, TITLE_COLUMNS
from recsys.serving.delta import Delta
from recsys.serving.engine import Engine
from recsys.serving.item_log import ItemChange
from recsys.serving.item_messages import (
    ItemAdded,
    ItemRemoved,
    ItemsAnswer,
    ItemsQuery,
    ListedItem,
    NewItem,
    PrunedAnswer,
)
from recsys.serving.messages import converted, decoded
from recsys.serving.reading import UnknownItem
from recsys.serving.service import Service

MAX_ADDED = 100_000
"""Items beside one index: each answer looks at all of them."""
NEW_ITEM = msgspec.json.Decoder(NewItem)


async def add(service: Service, request: Request) -> Reply:
    """POST /v1/items: answer with a new item from now on."""
    item = decoded(NEW_ITEM, await service.body(request))
    by = request.caller.name if request.caller else "http"
    return reply(await service.aside_run(_added, service, item, by))


async def remove(service: Service, request: Request) -> Reply:
    """DELETE /v1/items/{item_id}: answer with an item no more."""
    by = request.caller.name if request.caller else "http"
    return reply(await service.aside_run(_removed, service, request.tail, by))


async def listed(service: Service, request: Request) -> Reply:
    """GET /v1/items: what was added and removed, and what it means for this bundle."""
    query = converted(request.query(), ItemsQuery)
    return reply(await service.aside_run(_listed, service, query))


async def prune(service: Service, request: Request) -> Reply:
    """POST /admin/items/prune: forget changes that mean nothing for the champion."""
    return reply(await service.aside_run(_pruned, service))


def _added(service: Service, item: NewItem, by: str) -> ItemAdded:
    engine, log = service.engine, service.users().items
    service.items.view(engine, at_once=True)
    delta = service.items.delta(engine)
    how = _way(engine, item)
    _check_features(engine, item.features)
    if len(delta.ids) >= MAX_ADDED and item.item_id not in delta.places and how != "bundle":
        raise InputError(
            f"{len(delta.ids):,} items were added beside bundle {engine.version}, expected fewer "
            f"than {MAX_ADDED:,}: train with them, promote that bundle, and POST /admin/items/prune"
        )
    change = ItemChange(
        item_id=item.item_id,
        removed=False,
        moment=service.clock(),
        vector=None if item.vector is None else _vector(engine, item.vector),
        space=engine.space,
        like=item.like,
        features=item.features,
        by=by,
    )
    number = log.put([change])
    service.items.view(engine, at_once=True)
    unknown = [one for one in item.like if one not in engine.catalogue.index]
    return ItemAdded(item.item_id, how, number, engine.version, unknown)


def _removed(service: Service, item_id: str, by: str) -> ItemRemoved:
    engine, log = service.engine, service.users().items
    present = service.items.view(engine, at_once=True).catalogue.index
    before = service.items.changes.get(item_id)
    if item_id not in present and before is None and item_id not in engine.catalogue.index:
        raise UnknownItem(
            f"bundle {engine.version} has no item {item_id[:100]!r}, nor was it added"
        )
    if before is not None and before.removed:
        return ItemRemoved(item_id, before.number, True)
    number = log.put([ItemChange(item_id, True, service.clock(), by=by)])
    service.items.view(engine, at_once=True)
    return ItemRemoved(item_id, number, False)


def _listed(service: Service, query: ItemsQuery) -> ItemsAnswer:
    engine, log = service.engine, service.users().items
    service.items.view(engine, at_once=True)
    delta = service.items.delta(engine)
    newest, changes = log.since(query.after)
    items = [
        ListedItem(one.item_id, _state(engine, delta, one), one.number, one.moment, one.by)
        for one in changes[: query.limit]
    ]
    return ItemsAnswer(engine.version, newest, items)


def _pruned(service: Service) -> PrunedAnswer:
    engine, log = service.engine, service.users().items
    changes = log.since(0).changes
    known = engine.catalogue.index
    # What is removed and held must stay, or the item would come back.
    idle = [one for one in changes if one.removed != (one.item_id in known)]
    forgotten = log.forget(idle)
    return PrunedAnswer(forgotten, len(changes) - forgotten)


def _way(engine: Engine, item: NewItem) -> Literal["vector", "like", "bundle"]:
    """Return what a new item is found by; raise InputError where that cannot be."""
    if item.bundle is not None and item.bundle != engine.version:
        raise InputError(
            f"bundle: the vector was made for {item.bundle[:100]!r}, but {engine.version} answers; "
            "make it with that bundle's model, or leave `bundle` out"
        )
    if item.vector is not None:
        _vector(engine, item.vector)
    if item.item_id in engine.catalogue.index:
        return "bundle"
    if item.vector is not None:
        return "vector"
    if any(one in engine.catalogue.index for one in item.like):
        return "like"
    met = f"knows none of the {len(item.like)} in like" if item.like else "does not hold it"
    raise InputError(
        f"item_id: {item.item_id[:100]!r} is new, and bundle {engine.version} {met}; send a vector "
        "of its dimensions, or like: [ids of items that it holds]"
    )


def _vector(engine: Engine, vector: list[float]) -> bytes:
    dim = engine.search_index.vectors_ND.shape[1]
    if len(vector) != dim:
        raise InputError(
            f"vector: {len(vector)} numbers, expected {dim}, the dimensions of bundle "
            f"{engine.version}"
        )
    with np.errstate(over="ignore"):
        found = np.array(vector, np.float32)
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found))[0])
        raise InputError(
            f"vector[{place}]: {vector[place]} is not a finite float32; expected numbers such as "
            "the model's item vectors hold"
        )
    return found.tobytes()


def _check_features(engine: Engine, features: dict[str, Any]) -> None:
    """Raise InputError for a feature that the item table has not, or of the wrong kind."""
    known = engine.catalogue.feature_names
    for name, value in features.items():
        if name not in known:
            hint = suggestion(name[:60], known) or (
                f"; expected one of {', '.join(known)}" if known else "; it has none"
            )
            raise InputError(
                f"features: bundle {engine.version}'s items have no {name[:60]!r}{hint}"
            )
        texts = value if isinstance(value, list) and name in CATEGORY_COLUMNS else [value]
        if name in TITLE_COLUMNS + CATEGORY_COLUMNS and not all(
            text is None or isinstance(text, str) for text in texts
        ):
            raise InputError(f"features.{name}: expected text, found {str(value)[:60]}")


def _state(
    engine: Engine, delta: Delta, change: ItemChange
) -> Literal["added", "removed", "held", "stale"]:
    if change.removed:
        return "removed"
    if change.item_id in engine.catalogue.index:
        return "held"
    return "added" if change.item_id in delta.places else "stale"


ITEM_ROUTES: list[Route[Service]] = [
    Route("GET", "/v1/items", listed, "items"),
    Route("POST", "/v1/items", add, "items"),
    Route("DELETE", "/v1/items/{item_id}", remove, "items"),
    Route("POST", "/admin/items/prune", prune, "admin"),
]
