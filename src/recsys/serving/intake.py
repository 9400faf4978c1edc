"""Posted events on their way into the state: checked, then written together, durable on answer."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Sequence
from datetime import UTC, datetime

from recsys.schema import InputError
from recsys.serving.lanes import Lanes
from recsys.serving.messages import Event, EventsAnswer, Refused, milliseconds
from recsys.serving.state import LoggedEvent, Outcome, UserState

DAY = 86_400_000
AHEAD = 5 * 60_000
"""Clocks of callers may be ahead of ours by so many milliseconds."""
TOGETHER = 64
"""Posts that share one transaction, and its wait for the disk."""
NOT_KEPT = {
    "conflict": "this event_id was posted for this user before, with other content; send a new id",
    "late": "older than everything that is kept of this user; it would change nothing",
}


class Clock:
    """Milliseconds since 1970 that never go back, though the machine's clock may.

    >>> times = iter([5.0, 3.0, 6.0])
    >>> clock = Clock(lambda: next(times))
    >>> clock(), clock(), clock()
    (5000, 5000, 6000)
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self.wall, self.latest = wall, 0

    def __call__(self) -> int:
        """Return now."""
        self.latest = max(self.latest, int(self.wall() * 1000))
        return self.latest


class Intake:
    """Takes events into a user state; posts that wait at the same time share one transaction."""

    def __init__(self, state: UserState, keep_days: int, clock: Clock | None = None) -> None:
        self.state, self.keep_ms = state, keep_days * DAY
        self.clock = clock or Clock()
        self.lanes: Lanes[list[LoggedEvent], list[Outcome]] = Lanes(
            self._write, together=TOGETHER, name="intake"
        )

    async def take(
        self, events: Sequence[Event], known: Container[str]
    ) -> tuple[EventsAnswer, list[LoggedEvent]]:
        """Return what became of the events once it is durable, and those that are new.

        `known` are the items that answers can use. Raises StateUnavailable where the state cannot
        be written: then none of the events is kept.
        """
        now = self.clock()
        refused = [
            Refused(place, "invalid_event", why)
            for place, event in enumerate(events)
            if (why := self._refusal(event, now))
        ]
        wrong = {one.place for one in refused}
        places = [place for place in range(len(events)) if place not in wrong]
        logged = [self._logged(events[place], now) for place in places]
        outcomes = await self.lanes.submit(logged) if logged else []
        new = [event for event, how in zip(logged, outcomes, strict=True) if how == "accepted"]
        refused += [
            Refused(place, how, NOT_KEPT[how])
            for place, how in zip(places, outcomes, strict=True)
            if how in NOT_KEPT
        ]
        answer = EventsAnswer(
            accepted=len(new),
            repeated=Counter(outcomes)["repeated"],
            unknown_items=sum(event.item_id not in known for event in new),
            refused=sorted(refused, key=lambda one: one.place),
        )
        return answer, new

    def close(self) -> None:
        """Write what waits, and end."""
        self.lanes.close()

    def _refusal(self, event: Event, now: int) -> str | None:
        if event.timestamp is None:
            return None
        moment = milliseconds(event.timestamp)
        if moment > now + AHEAD:
            return f"timestamp: {_date(moment)} lies ahead of this server's clock, {_date(now)}"
        if moment < now - self.keep_ms:
            days = self.keep_ms // DAY
            return (
                f"timestamp: {_date(moment)} is more than the {days} days ago that this server "
                "keeps; older events belong into the log that `recsys prepare` reads, or start it "
                "with a larger --keep-days"
            )
        return None

    def _logged(self, event: Event, now: int) -> LoggedEvent:
        return LoggedEvent(
            event_id=event.event_id or uuid.uuid4().hex,
            user_id=event.user_id,
            item_id=event.item_id,
            event_type=event.event_type,
            timestamp=now if event.timestamp is None else milliseconds(event.timestamp),
            received=now,
            value=event.value,
            answer_id=event.answer_id,
        )

    def _write(self, posts: Sequence[list[LoggedEvent]]) -> list[list[Outcome]]:
        outcomes = iter(self.state.append([event for post in posts for event in post]))
        return [[next(outcomes) for _ in post] for post in posts]


def single(answer: EventsAnswer) -> EventsAnswer:
    """Return the answer to one posted event, or raise what it was refused for."""
    if not answer.refused:
        return answer
    refused = answer.refused[0]
    raise (Conflict if refused.code == "conflict" else InputError)(refused.message)


class Conflict(InputError):
    """An event id that came before, with other content."""


def _date(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1000, UTC).isoformat(timespec="seconds")
