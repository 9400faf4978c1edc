"""One worker's running parts, and the way of a request through them.

A request is admitted, answered on a lane by the arm that its user belongs to, counted, and logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import structlog

from recsys.schema import InputError
from recsys.serving import metrics
from recsys.serving.asgi import Request
from recsys.serving.delta import View
from recsys.serving.deployment import Deployer, Roster
from recsys.serving.engine import Engine, use_one_core
from recsys.serving.explain_messages import ExplainAnswer, ExplainRequest
from recsys.serving.guard import Guard, Keys, Refusal
from recsys.serving.intake import Clock, Intake
from recsys.serving.item_feed import ItemFeed
from recsys.serving.lanes import Lanes
from recsys.serving.log import AnswerJournal, LoggedAnswer, Shipper, erase
from recsys.serving.messages import (
    Answer,
    Arm,
    Event,
    EventsAnswer,
    ItemAnswer,
    Person,
    RankAnswer,
    RankRequest,
    Recommended,
    RecommendRequest,
    SimilarAnswer,
    milliseconds,
)
from recsys.serving.protocol import Patience
from recsys.serving.settings import ServeSettings
from recsys.serving.state import StateUnavailable, UserPath, UserState, user_hash
from recsys.serving.tracing import Spans
from recsys.serving.trial import Trial, choose, new_answer_id

log = structlog.get_logger("recsys.serving")
Result = TypeVar("Result")
Asked = RecommendRequest | RankRequest
Given = Answer | RankAnswer
TOGETHER = 16
"""Requests that a thread answers as one batch, where so many wait."""
REASONING = 8
"""Requests for reasons that may wait; further ones are refused."""
LOGGED_HISTORY = 1_000
"""So many of the newest events of a request's own history are logged with its answer."""
LOGGED_ITEMS = 1_000
"""So many of the items that an answer begins with are logged."""


class Overloaded(Refusal):
    """More requests wait than the server was set to take."""

    status, code = 429, "overloaded"

    def __init__(self) -> None:
        said = "more requests wait than this server takes; try again after a second"
        super().__init__(said, {"retry-after": "1"})


class Late(Exception):
    """An answer was not ready at its deadline."""


class NoState(Refusal):
    """A request about users' paths to a server that keeps none."""

    status, code = 404, "no_state"


@dataclass(frozen=True, slots=True)
class Job:
    """The requests of one HTTP request, and who answers each."""

    requests: Sequence[Asked]
    arms: Sequence[Arm]


class Service:
    """What a worker holds: the engines in use, its threads, the users' paths, its numbers."""

    def __init__(
        self,
        deployer: Deployer,
        settings: ServeSettings,
        *,
        state: UserState | None = None,
        journal: AnswerJournal | None = None,
        log_dir: Path | None = None,
        shipper: Shipper | None = None,
        guard: Guard | None = None,
        tracer: Spans | None = None,
        find: Callable[[str], Path] = Path,
    ) -> None:
        self.deployer, self.settings, self.state = deployer, settings, state
        self.journal, self.log_dir, self.shipper = journal, log_dir, shipper
        self.tracer = tracer
        self.guard, self.find = guard or Guard(Keys({})), find
        self.metrics = metrics.Metrics()
        self.clock = Clock()
        self.trial = Trial(deployer, ask=self._ask, idle=lambda: self.lanes.pending == 0)
        self.trial.on_compared = self.metrics.overlap.observe
        self.trial.on_return = self.metrics.swaps.labels("returned").inc
        self.patience = Patience()
        self.erased: dict[bytes, int] = {}
        self.lanes: Lanes[Job, list[Given]] = Lanes(
            self._answer, settings.threads, TOGETHER, "engine", use_one_core, self._light
        )
        self.items = ItemFeed(state.items if state else None)
        self.intake = Intake(state, settings.keep_days, self.clock) if state else None
        self.aside = ThreadPoolExecutor(2, "aside", initializer=use_one_core)
        self.reasons = ThreadPoolExecutor(1, "reasons", initializer=use_one_core)
        self.reasoning = 0
        self.stopping = False
        deployer.on_change(self.deployed)
        self.deployed(deployer.current)

    @property
    def engine(self) -> Engine:
        """Return the champion."""
        return self.deployer.current.champion

    def deployed(self, roster: Roster) -> None:
        """Show which bundles answer from now on."""
        arms = {"champion": roster.champion, "challenger": roster.challenger}
        for engine in filter(None, arms.values()):
            self.items.view(engine)  # so that no answer waits for what changed before
        self.metrics.serving(
            [
                (engine.version, str(engine.bundle.manifest["model"]), arm)
                for arm, engine in arms.items()
                if engine
            ]
        )

    async def recommend(self, requests: Sequence[RecommendRequest]) -> list[Answer]:
        """Answer within the deadline: by the model, or with what is popular where it is late.

        Raises Overloaded where too many wait already, and InputError where a request is wrong.
        """
        return cast(list[Answer], await self._within_deadline(requests))

    async def rank(self, request: RankRequest) -> RankAnswer:
        """Order a caller's own items within the deadline, or return them as given where it is late.

        Raises as `recommend`.
        """
        (answer,) = await self._within_deadline([request])
        return cast(RankAnswer, answer)

    async def _within_deadline(self, given: Sequence[Asked]) -> list[Given]:
        for request in given:
            check_limits(request, self.settings)
        requests = [self._settled(request) for request in given]
        roster = self.deployer.current
        arms = [choose(roster, request.user_id) for request in requests]
        started = time.perf_counter()
        future = self.lanes.submit(Job(requests, arms))
        late = asyncio.get_running_loop().call_later(self._seconds(requests), _give_up, future)
        try:
            answers = await future
        except Late:
            answers = await self.aside_run(self._popular, roster, arms, requests)
        finally:
            late.cancel()
        # After the reply has left: counting takes a tenth of what an answer does.
        seconds = time.perf_counter() - started
        asyncio.get_running_loop().call_soon(self._count, requests, answers, seconds)
        return answers

    def _settled(self, request: Asked) -> Asked:
        """Fill in what the server decides, so that the log tells it: the moment, exploration."""
        facts: dict[str, Any] = {} if request.now is not None else {"now": self.clock()}
        if isinstance(request, RecommendRequest) and request.explore is None:
            facts["explore"] = self.settings.explore
        return msgspec.structs.replace(request, **facts) if facts else request

    async def take(self, events: Sequence[Event]) -> EventsAnswer:
        """Take posted events; return once they are durable. Raises StateUnavailable."""
        intake = self._need(self.intake)
        if intake.lanes.pending >= self.settings.queue:
            raise Overloaded()
        try:
            answer, new = await intake.take(events, self.engine.catalogue.index)
        except StateUnavailable:
            self.metrics.state_errors.inc()
            raise
        self.metrics.took(answer)
        for event in new:
            if event.answer_id and (arm := self.trial.clicked(event.answer_id)):
                self.metrics.clicks.labels(arm).inc()
        return answer

    @property
    def full(self) -> bool:
        """Whether no further request can wait: too many do, or it would take too long."""
        late = self.lanes.wait > self.settings.queue_ms / 1000
        return late or self.lanes.pending >= self.settings.queue

    async def body(self, request: Request) -> bytes:
        """Return a request's body, within this server's limits of size and time."""
        return await request.body(self.settings.max_body_bytes, self.settings.body_seconds)

    async def aside_run(self, work: Callable[..., Result], *inputs: object) -> Result:
        """Call something rare or slow beside the lanes."""
        return await asyncio.get_running_loop().run_in_executor(self.aside, work, *inputs)

    def similar(self, item_id: str, k: int) -> SimilarAnswer:
        """Return the items nearest to one; raise UnknownItem."""
        return self.engine.similar(item_id, k, self.items.view(self.engine))

    async def explain(self, request: ExplainRequest) -> ExplainAnswer:
        """Say why items score as they do with the model that answers this person.

        One request after the other, beside all else: each takes as long as many recommendations.
        Raises Overloaded where several wait, and InputError where a request is wrong.
        """
        check_limits(request, self.settings)
        if self.reasoning >= REASONING:
            raise Overloaded()
        self.reasoning += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.reasons, self._explained, request)
        finally:
            self.reasoning -= 1

    def item(self, item_id: str) -> ItemAnswer:
        """Return what is known about an item; raise UnknownItem."""
        return self.engine.item(item_id, self.items.view(self.engine))

    def users(self) -> UserState:
        """Return the users' paths, or raise NoState."""
        return self._need(self.state)

    def erase_logged(self, user_id: str) -> int:
        """Take a user's rows out of the log; return how many there were."""
        return erase(self.log_dir, user_id) if self.log_dir else 0

    def gauge(self) -> None:
        """Look at what is not counted as it happens."""
        self.metrics.in_flight.set(self.lanes.pending)
        follow = self.metrics.follow
        if self.journal:
            follow(self.metrics.dropped, self.journal.dropped)
        if self.shipper:
            follow(self.metrics.log_failures, self.shipper.failures)
            follow(self.metrics.log_torn, self.shipper.torn)
        for reason, count in self.patience.refused.items():
            follow(self.metrics.refused.labels(reason), count)
        if self.state:
            with suppress(StateUnavailable):
                self.metrics.outbox.set(self.state.backlog())
                self.erased = dict(self.state.erased())
        delta = self.items.delta(self.engine)
        self.metrics.items_added.set(len(delta.ids))
        self.metrics.items_removed.set(delta.gone.count if delta.gone else 0)

    def close(self) -> None:
        """End the threads, after what waits; the parts given from outside stay open."""
        self.lanes.close()
        if self.intake:
            self.intake.close()
        self.trial.close()
        self.aside.shutdown()
        self.reasons.shutdown()

    def _need(self, part: Result | None) -> Result:
        if part is None:
            raise NoState("this server keeps no users' paths; start it with --state")
        return part

    def _seconds(self, requests: Sequence[Asked]) -> float:
        asked = [request.deadline_ms for request in requests if request.deadline_ms]
        return min(asked, default=self.settings.deadline_ms) / 1000

    def _light(self, job: Job) -> bool:
        """Whether a job may be answered on the event loop: a recommendation, and no waiting."""
        single = len(job.requests) == 1 and isinstance(job.requests[0], RecommendRequest)
        return single and not self.settings.far_state

    def _answer(self, jobs: Sequence[Job]) -> list[list[Given] | BaseException]:
        """Answer jobs on a lane; a job that fails does not take the others with it."""
        roster = self.deployer.current
        try:
            answers = iter(self._all(roster, jobs))
            return [[next(answers) for _ in job.requests] for job in jobs]
        except Exception as error:
            return [self._alone(roster, job) for job in jobs] if len(jobs) > 1 else [error]

    def _alone(self, roster: Roster, job: Job) -> list[Given] | BaseException:
        try:
            return self._all(roster, [job])
        except Exception as error:
            return error

    def _all(self, roster: Roster, jobs: Sequence[Job]) -> list[Given]:
        """Return the answers to all jobs' requests in a row, each by its arm."""
        requests = [request for job in jobs for request in job.requests]
        arms = [arm for job in jobs for arm in job.arms]
        found: dict[int, Given] = {}
        for arm in dict.fromkeys(arms):
            places = [place for place, own in enumerate(arms) if own == arm]
            answers = self._by(roster, arm, [requests[place] for place in places])
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(requests))]

    def _by(self, roster: Roster, arm: Arm, requests: Sequence[Asked]) -> list[Given]:
        """Return one arm's answers; where the challenger fails, the champion's."""
        paths = [self._path(request) for request in requests]
        if arm == "challenger" and roster.challenger:
            try:
                ids = [new_answer_id(arm, roster.trial) for _ in requests]
                view = self.items.view(roster.challenger)
                return answered(roster.challenger, requests, paths, ids, arm, view)
            except InputError:
                raise
            except Exception as error:
                self.trial.failed(arm)
                log.exception("challenger_failed", error=type(error).__name__)
        ids = [new_answer_id("champion", roster.trial) for _ in requests]
        view = self.items.view(roster.champion)
        return answered(roster.champion, requests, paths, ids, "champion", view)

    def _path(self, request: RecommendRequest | Person) -> UserPath | None:
        """Return what a user did of late; with a history of its own only its erasure counts.

        Where the state does not answer, the bundle's own history still serves, but of the erased.
        """
        if self.state is None or request.user_id is None:
            return None
        try:
            return self.state.path(request.user_id)
        except StateUnavailable as error:
            self.metrics.state_errors.inc()
            log.warning("state_unavailable", reason=str(error))
            return UserPath([], [], [], [], self.erased.get(user_hash(request.user_id), 0))

    def _explained(self, request: ExplainRequest) -> ExplainAnswer:
        roster = self.deployer.current
        engine = _engine(roster, choose(roster, request.user_id))
        now = self.clock() if request.now is None else request.now
        asked = msgspec.structs.replace(request, now=now)
        return engine.explain(asked, self._path(asked), self.items.view(engine))

    def _popular(
        self, roster: Roster, arms: Sequence[Arm], requests: Sequence[Asked]
    ) -> list[Given]:
        """Return what stands in for answers that are late; it counts against their arms."""
        return [self._instead(roster, *pair) for pair in zip(arms, requests, strict=True)]

    def _instead(self, roster: Roster, arm: Arm, request: Asked) -> Given:
        engine = _engine(roster, arm)
        answer: Given
        asked = self._path(request), self.items.view(engine)
        if isinstance(request, RankRequest):
            answer = engine.as_given(request, *asked)
        else:
            answer = engine.popular(request, *asked)
        facts = {"arm": arm, "answer_id": new_answer_id(arm, roster.trial), "fallback": "deadline"}
        return msgspec.structs.replace(answer, **facts)

    def _ask(self, engine: Engine, request: RecommendRequest) -> Answer:
        """Answer as a challenger would, without exploring; what the trial compares in shadow."""
        plain = msgspec.structs.replace(request, explore=0.0)
        return engine.recommend([plain], [self._path(request)], view=self.items.view(engine))[0]

    def _count(self, requests: Sequence[Asked], answers: Sequence[Given], seconds: float) -> None:
        self.metrics.answered(answers)
        now = self.clock()
        for request, answer in zip(requests, answers, strict=True):
            self.trial.answered(request, answer, seconds)
            if self.journal:
                self.journal.record(logged(request, answer, now))


def _engine(roster: Roster, arm: Arm) -> Engine:
    return (roster.challenger if arm == "challenger" else None) or roster.champion


def answered(
    engine: Engine,
    requests: Sequence[Asked],
    paths: Sequence[UserPath | None],
    ids: Sequence[str],
    arm: Arm,
    view: View,
) -> list[Given]:
    """Return an engine's answers: recommendations as one batch, rankings one by one."""
    found: dict[int, Given] = {}
    plain: dict[int, RecommendRequest] = {}
    for place, request in enumerate(requests):
        if isinstance(request, RankRequest):
            found[place] = engine.rank(request, paths[place], ids[place], arm, view)
        else:
            plain[place] = request
    if plain:
        theirs = [paths[place] for place in plain], [ids[place] for place in plain]
        answers = engine.recommend([*plain.values()], *theirs, arm, view)
        found.update(zip(plain, answers, strict=True))
    return [found[place] for place in range(len(requests))]


def _give_up(future: asyncio.Future[list[Given]]) -> None:
    if not future.done():
        future.set_exception(Late())


def logged(request: Asked, answer: Given, now: int) -> LoggedAnswer:
    """Return what the log keeps of an answer: enough to score its items again."""
    items = answer.items[:LOGGED_ITEMS]
    asked = request.person() if isinstance(request, RankRequest) else request
    drawn = [i.propensity for i in items if isinstance(i, Recommended) and i.propensity is not None]
    return LoggedAnswer(
        answer_id=answer.answer_id,
        user_id=asked.user_id,
        time=now,
        bundle=answer.bundle,
        arm=answer.arm,
        source=answer.source,
        k=request.k or len(items),
        items=[item.item_id for item in items],
        scores=[item.score for item in items if item.score is not None],
        fallback=answer.fallback,
        propensities=drawn or None,
        explore=asked.explore if drawn else None,
        now=now if asked.now is None else milliseconds(asked.now),
        context=_json(asked.context),
        weights=_json(asked.weights),
        boosts=_json(asked.boosts),
        history=_json(asked.history[-LOGGED_HISTORY:] if asked.history else None),
        history_used=answer.history_used,
        path=answer.path,
    )


def _json(value: object) -> str | None:
    """Return JSON text, None for what has nothing in it."""
    text = msgspec.json.encode(value).decode() if value else "null"
    return None if text in ("{}", "null") else text


def check_limits(request: RecommendRequest | Person, settings: ServeSettings) -> None:
    """Raise InputError where a request asks for more than this server was set to give."""
    if isinstance(request, RecommendRequest):
        check_k(request.k, settings)
    if request.history and len(request.history) > settings.max_history:
        raise InputError(
            f"history: {len(request.history)} events are over this server's limit of "
            f"{settings.max_history}; send the newest"
        )


def check_k(k: int, settings: ServeSettings) -> None:
    """Raise InputError where `k` is over what this server was set to give."""
    if k > settings.max_k:
        raise InputError(f"k: {k} is over this server's limit of {settings.max_k}")
