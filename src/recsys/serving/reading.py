"""From a request to what the models read of it: ids become indices, wishes become rules.

Shapes: T tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys.history import OWN_RECENCY, Arrays
from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.candidates import Reading, ignored, passed_over
from recsys.serving.catalogue import Catalogue
from recsys.serving.delta import View
from recsys.serving.messages import RankRequest, RecommendRequest, milliseconds
from recsys.serving.paths import EMPTY, Trajectory, given, joined, since, stored
from recsys.serving.ranking import Ranker
from recsys.serving.rules import rules_of

if TYPE_CHECKING:
    from recsys.serving.state import UserPath


class UnknownItem(InputError):
    """An item id that the bundle does not hold."""


class Reader:
    """Resolves requests against one bundle; `view` is the items as they are now."""

    def __init__(self, bundle: Bundle, catalogue: Catalogue, ranker: Ranker | None) -> None:
        self.bundle, self.catalogue, self.ranker = bundle, catalogue, ranker
        self.users, self.has_time = bundle.users, bundle.has_time
        self.inputs, self.version = bundle.encoder_inputs, bundle.version
        self.reach = max(bundle.max_length, ranker.max_length if ranker else 0)
        # Plain arrays over the mapped pages: slicing a numpy.memmap costs five times as much.
        self.events = {name: np.asarray(array) for name, array in bundle.events.items()}

    def read(
        self,
        request: RecommendRequest,
        live: UserPath | None,
        view: View,
        unknown_items: Sequence[str] = (),
    ) -> Reading:
        """Resolve one request; `live` is what its user did since the bundle was made."""
        now, unknown = moment_of(request), [*unknown_items]
        user, path = self.path(request, live, now, unknown)
        added = view.catalogue.added(_named(request, live)) if request.exclude_seen else ()
        return self.readings(request, [(user, path)], now, unknown, view, added)[0]

    def readings(
        self,
        request: RecommendRequest,
        people: Iterable[tuple[int, Trajectory]],
        now: int,
        unknown: list[str],
        view: View,
        seen: Iterable[int] = (),
    ) -> list[Reading]:
        """Resolve one request for people by their rows plus one, 0 for unknown, and their paths.

        now: milliseconds. unknown: ids of items in it that the bundle does not have. seen: items
        beside those of the path that are not to be recommended again. What a path holds lies before
        the moment asked, whatever its clock says.
        Raises InputError where the request cannot be answered with this bundle.
        """
        excluded = [*seen, *_indices(view, request.exclude_items, unknown)]
        chosen = view.catalogue.filter(request.allow_categories, request.deny_categories)
        rules = rules_of(request, view.catalogue, view.boosts)
        lacking, recency = ignored(unknown, chosen, rules), self._recency(request)
        readings = []
        for user, path in people:
            at = now if self.has_time or not len(path.times) else int(path.times[-1]) + 1
            requested, weights_T = self._asked_of_ranker(request, user, at)
            reading = Reading(
                view=view,
                path=path.last(self.reach).before(at),
                out=passed_over(excluded, path if request.exclude_seen else EMPTY),
                filter=chosen,
                rules=rules,
                user=user,
                now=at,
                recency=recency,
                k=request.k,
                ignored=lacking,
                requested=requested,
                weights_T=weights_T,
            )
            readings.append(reading)
        return readings

    def own(
        self, view: View, request: RankRequest, path: UserPath | None
    ) -> tuple[Reading, NDArray[np.int64]]:
        """Read a request with its own items; return it and those that the bundle knows."""
        unknown: list[str] = []
        items = self.items(view, request.items, unknown)
        return self.read(request.person(), path, view, unknown), items

    def items(self, view: View, item_ids: Sequence[str], unknown: list[str]) -> NDArray[np.int64]:
        """Return a caller's items, each once; what the bundle does not know goes to `unknown`.

        Raises InputError where it knows none of them.
        """
        known = _indices(view, [*dict.fromkeys(item_ids)], unknown)
        if not known:
            raise InputError(
                f"items: bundle {self.version} knows none of the {len(unknown)} given, such as "
                f"{unknown[0][:60]!r}; expected ids of its items"
            )
        return np.array(known, np.int64)

    def path(
        self, request: RecommendRequest, live: UserPath | None, now: int, unknown: list[str]
    ) -> tuple[int, Trajectory]:
        """Return the user's row plus one, 0 for none, and the path to answer from."""
        row = self.users.get(request.user_id) if request.user_id is not None else None
        user, path = (0, EMPTY) if row is None else (row + 1, stored(self.events, row))
        if live is not None and live.erased_before:
            kept = since(path, live.erased_before, self.has_time)
            # What a model learnt of a person by id goes with the events that it learnt it from.
            user, path = user if len(kept.items) == len(path.items) else 0, kept
        index = self.catalogue.index
        if request.history:
            return user, given(request.history, now, index, self.has_time, unknown)
        return user, path if live is None else joined(path, live, index, self.has_time)

    def stored_events(self, user_id: str, erased_before: int = 0) -> int:
        """Return how many events of a user the bundle holds that an erasure has not undone."""
        row = self.users.get(user_id)
        if row is None:
            return 0
        return len(since(stored(self.events, row), erased_before, self.has_time).items)

    def known(self, item_id: str, view: View) -> int:
        """Return an item's index; raise UnknownItem."""
        index: int | None = view.catalogue.index.get(item_id)
        if index is None:
            raise UnknownItem(f"bundle {self.version} has no item {item_id[:100]!r}")
        return index

    def _asked_of_ranker(
        self, request: RecommendRequest, user: int, now: int
    ) -> tuple[Arrays, NDArray[np.float64]]:
        """Return a request's own arrays and task weights; raise InputError without a use for them.

        In a bundle without a ranker, or with one that has neither, both have no effect.
        """
        ranker, tasks = self.ranker, request.weights.tasks
        if request.context and (ranker is None or ranker.encoded is None):
            raise InputError(
                f"context: {', '.join(request.context)[:60]} has no effect on bundle "
                f"{self.version}: it has no ranker that reads a context; leave it out, or train "
                "with features of the request and export again"
            )
        if tasks and (ranker is None or not ranker.tasks):
            raise InputError(
                f"weights.tasks: {', '.join(tasks)[:60]} has no effect on bundle {self.version}: "
                "it has no ranker of tasks; leave it out, or train one and export again"
            )
        if ranker is None:
            return {}, np.zeros(0)
        return ranker.requested(user, request.context, now), ranker.weights(tasks)

    def _recency(self, request: RecommendRequest) -> float:
        recency = request.weights.recency
        if recency is None:
            return OWN_RECENCY
        if "recency" not in self.inputs:
            raise InputError(
                f"weights.recency: {recency:g} has no effect on bundle {self.version}: its encoder "
                f"reads {', '.join(self.inputs)}, expected recency among them; leave it out, or "
                "train with model=trajectory model.blend=true and export again"
            )
        return recency


def moment_of(request: RecommendRequest) -> int:
    """Return the moment that a request is answered for, in milliseconds."""
    return int(time.time() * 1000) if request.now is None else milliseconds(request.now)


def _named(request: RecommendRequest, live: UserPath | None) -> Iterator[str]:
    """Yield the items that a person did something with, as far as no bundle tells."""
    if not request.history:
        yield from live.items if live else ()
    for event in request.history or ():
        yield event if isinstance(event, str) else event.item_id


def _indices(view: View, item_ids: Sequence[str], unknown: list[str]) -> list[int]:
    """Return the indices of known items; the others are added to `unknown`."""
    found = [view.catalogue.index.get(item_id) for item_id in item_ids]
    unknown += [i for i, index in zip(item_ids, found, strict=True) if index is None]
    return [index for index in found if index is not None]
