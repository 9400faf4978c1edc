"""Why an item scores as it does: what the score owes to events of the path, and to the context.

An effect is the score less what it would be had some events not happened, all else being equal: the
model itself is asked, not a stand-in for it. Source: erasure (Li, Monroe and Jurafsky 2016, section
2). Shapes: E events of a path, C items, V readings: the whole first, then each without something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from recsys.schema import EVENT_TYPES
from recsys.serving.candidates import Reading
from recsys.serving.catalogue import Catalogue
from recsys.serving.choosing import Weighed
from recsys.serving.delta import View
from recsys.serving.explain_messages import ExplainedItem, ExplainRequest, Reason
from recsys.serving.messages import EventType, RecommendRequest
from recsys.serving.paths import Trajectory
from recsys.serving.reading import Reader, moment_of

if TYPE_CHECKING:
    from recsys.serving.state import UserPath


@dataclass(frozen=True)
class Erasures:
    """A request read as it is, and read again without each of some things: V readings.

    reasons: the events that are taken away in turn, told but for their effect; context: the names
    of the request's own values, taken away after them.
    """

    items_C: NDArray[np.int64]
    item_ids: list[str]
    reasons: list[Reason]
    context: list[str]
    readings: list[Reading]

    @classmethod
    def of(
        cls, reader: Reader, request: ExplainRequest, live: UserPath | None, view: View
    ) -> Erasures:
        """Read a request; raise InputError where it cannot be answered with this bundle."""
        asked, unknown = request.person(), list[str]()
        now, items_C = moment_of(asked), reader.items(view, request.items, unknown)
        user, path = reader.path(asked, live, now, unknown)
        parts = _parts(path, reader.reach, request.by, view.catalogue)
        paths = [path, *(path.at(~chosen_E) for chosen_E in parts.values())]
        readings = reader.readings(asked, [(user, p) for p in paths], now, unknown, view)
        for other in _without_context(asked):
            readings += reader.readings(other, [(user, path)], now, [], view)
        reasons = [_told(name, chosen_E, path, reader) for name, chosen_E in parts.items()]
        ids = [view.catalogue.ids[item] for item in items_C.tolist()]
        return cls(items_C, ids, reasons, [*asked.context], readings)

    def explained(self, said: Sequence[Weighed], count: int) -> list[ExplainedItem]:
        """Return each item with its `count` greatest reasons, of what is said of each reading."""
        whole, *others = said
        items = []
        for place, item_id in enumerate(self.item_ids):
            effects = [_effect(whole, other, place) for other in others]
            reasons = _greatest(self.reasons, effects[: len(self.reasons)], count)
            context = dict(zip(self.context, effects[len(self.reasons) :], strict=True))
            score = float(whole.scored.scores_C[place])
            items.append(ExplainedItem(item_id, score, reasons, context))
        return items


def _parts(
    path: Trajectory, reach: int, by: Literal["item", "category"], catalogue: Catalogue
) -> dict[str, NDArray[np.bool_]]:
    """Return where a path's events are, [E], by their items or by the categories of these.

    The newest come first; what the newest `reach` events do not have is left out. Raises InputError
    where items have no categories.
    """
    items = dict.fromkeys(path.items[-reach:][::-1].tolist())
    if by == "item":
        return {catalogue.ids[item]: path.items == item for item in items}
    catalogue.need_categories("leave out by=category")
    names = dict.fromkeys(name for item in items for name in _names(catalogue.categories[item]))
    return {name: np.isin(path.items, catalogue.members[name]) for name in names}


def _names(category: str | list[str] | None) -> Sequence[str]:
    return [category] if isinstance(category, str) else category or ()


def _without_context(request: RecommendRequest) -> Iterator[RecommendRequest]:
    """Yield a request without each value of its context in turn."""
    for name in request.context:
        left = {other: value for other, value in request.context.items() if other != name}
        yield msgspec.structs.replace(request, context=left)


def _told(name: str, chosen_E: NDArray[np.bool_], path: Trajectory, reader: Reader) -> Reason:
    """Return what is said of some events, of those that models read."""
    read = path.last(reader.reach).at(chosen_E[-reader.reach :])
    types = [kind for code, kind in enumerate(EVENT_TYPES, 1) if code in read.types]
    last = int(read.times[-1]) if reader.has_time else None
    return Reason(name, len(read.items), cast("list[EventType]", types), last=last)


def _effect(whole: Weighed, without: Weighed, place: int) -> float | None:
    """Return how much an item's score is lower without something; None where another judged."""
    if whole.by != without.by:
        return None
    return float(whole.scored.scores_C[place] - without.scored.scores_C[place])


def _greatest(
    reasons: Sequence[Reason], effects: Sequence[float | None], count: int
) -> list[Reason]:
    """Return the reasons that raise a score most, of equal ones the newest first."""
    order = sorted(range(len(reasons)), key=lambda place: -(effects[place] or 0.0))[:count]
    return [msgspec.structs.replace(reasons[place], effect=effects[place]) for place in order]
