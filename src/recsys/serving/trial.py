"""A challenger beside the champion: who sees it, how it does, and when it has to go.

In shadow the challenger answers unseen what the champion has answered already; as a canary it
answers a fixed share of users. Each worker counts its own share of both arms and judges by that
alone: the first to find a bound crossed ends the trial for all.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import structlog
from msgspec import Struct

from recsys.serving.engine import Engine, use_one_core
from recsys.serving.messages import Answer, Arm, RankAnswer, RankRequest, RecommendRequest

if TYPE_CHECKING:
    from recsys.serving.deployment import Bounds, Deployer, Mode, Roster

log = structlog.get_logger("recsys.serving")
ARMS: tuple[Arm, Arm] = ("champion", "challenger")
LETTERS = {"champion": "c", "challenger": "x"}
ARM_OF: dict[str, Arm] = {"c": "champion", "x": "challenger"}
CERTAIN = 2.326
"""Standard deviations that a difference exceeds by chance once in a hundred (one-sided)."""
PER_OCTAVE = 16
FASTEST_MS = 0.01
BUCKETS = 23 * PER_OCTAVE
"""Latencies from 10 µs to 84 s, each known to within 2.2 %."""
REMEMBERED = 50_000
"""Answers of which a first click is remembered, so that further ones do not count."""
WAITING = 64
"""Shadow answers that may wait; further ones are dropped."""
JUDGED_EVERY = 0.5
PATIENCE = 0.05
"""Seconds that a shadow answer waits for a moment in which no one else does."""

_next = itertools.count(1).__next__
_prefix = secrets.token_hex(8)


def _redraw() -> None:
    global _prefix
    _prefix = secrets.token_hex(8)


# A forked process would count on from the same number.
os.register_at_fork(after_in_child=_redraw)


def new_answer_id(arm: Arm, trial: int = 0) -> str:
    """Return an id that no other answer has; it says which arm answered, and in which trial.

    >>> new_answer_id("challenger", 7).startswith("x7-")
    True
    """
    return f"{LETTERS[arm]}{trial}-{_prefix}{_next():x}"


def arm_of(answer_id: str) -> Arm | None:
    """Return which arm gave an answer, or None where the id is not one of ours.

    >>> arm_of("x7-00"), arm_of("c0-00"), arm_of("order 7")
    ('challenger', 'champion', None)
    """
    return ARM_OF.get(answer_id[:1]) if _trial_of(answer_id) is not None else None


def _trial_of(answer_id: str) -> int | None:
    number = answer_id[1 : answer_id.find("-")]
    return int(number) if number.isdecimal() and len(number) < 19 else None


def choose(roster: Roster, user_id: str | None) -> Arm:
    """Return who answers a user: the same arm each time, in every process, through a whole trial.

    A larger share keeps the users that it had. Another challenger is shown to other users, lest
    the same ones try everything. Who is not named gets the champion.
    """
    if roster.mode != "canary" or roster.challenger is None or user_id is None:
        return "champion"
    salted = f"{roster.challenger.version}\0{user_id}".encode("utf-8", "surrogatepass")
    place = int.from_bytes(blake2b(salted, digest_size=8).digest(), "big") / 2**64
    return "challenger" if place < roster.share or roster.share >= 1 else "champion"


class Histogram:
    """Counts of latencies in buckets that grow by 4.4 %; a quantile is a bucket's middle.

    >>> histogram = Histogram()
    >>> for milliseconds in (1.0, 1.0, 1.0, 8.0):
    ...     histogram.add(milliseconds)
    >>> round(histogram.quantile(0.5), 1), round(histogram.quantile(0.99), 0)
    (1.0, 8.0)
    """

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS

    def add(self, milliseconds: float) -> None:
        """Count one latency."""
        octaves = math.log2(max(milliseconds, FASTEST_MS) / FASTEST_MS)
        self.counts[min(int(octaves * PER_OCTAVE), BUCKETS - 1)] += 1

    def quantile(self, share: float) -> float:
        """Return the milliseconds that `share` of the latencies do not exceed, 0.0 of none."""
        wanted = share * sum(self.counts)
        for bucket, so_far in enumerate(itertools.accumulate(self.counts)):
            if so_far >= wanted > 0:
                return float(FASTEST_MS * 2 ** ((bucket + 0.5) / PER_OCTAVE))
        return 0.0

    def __add__(self, other: Histogram) -> Histogram:
        total = Histogram()
        total.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return total


@dataclass(slots=True)
class Tally:
    """Answers of one arm over a while: how many, how many failed, how long they took."""

    answers: int = 0
    failed: int = 0
    latency: Histogram = field(default_factory=Histogram)

    def add(self, milliseconds: float, failed: bool) -> None:
        """Count one answer."""
        self.answers += 1
        self.failed += failed
        self.latency.add(milliseconds)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.answers + other.answers, self.failed + other.failed, self.latency + other.latency
        )

    @property
    def error_rate(self) -> float:
        """Share of answers that failed."""
        return self.failed / max(1, self.answers)


class ArmReport(Struct, frozen=True):
    """How one arm does in this process."""

    answers: int
    failed: int
    clicked: int
    p50_ms: float
    p99_ms: float


class ShadowReport(Struct, frozen=True):
    """How alike both arms answer: items shared, and the order of those (1 alike, -1 reversed)."""

    compared: int
    overlap: float
    rank_correlation: float | None
    dropped: int


class TrialReport(Struct, frozen=True, omit_defaults=True):
    """The present trial, as this process has seen it."""

    trial: int
    champion: ArmReport
    challenger: ArmReport
    shadow: ShadowReport | None = None
    verdict: str | None = None


class Counts:
    """All that one process counts of one trial; its methods may be called from any thread.

    Errors and latency are judged on the newest answers, one or two windows of at least
    `min_answers`, so that a challenger that turns bad late is found as soon as one bad from the
    start; click-through, on the whole trial. It is looked at again and again, which makes a return
    without cause likelier than one in a hundred: the safe side to err on.
    """

    def __init__(self, trial: int, mode: Mode, bounds: Bounds) -> None:
        self.trial, self.mode, self.bounds = trial, mode, bounds
        self.lock = threading.Lock()
        self.before, self.now = _tallies(), _tallies()
        self.answers = dict.fromkeys(ARMS, 0)
        self.failed = dict.fromkeys(ARMS, 0)
        self.clicks = dict.fromkeys(ARMS, 0)
        self.clicked_ids: dict[str, None] = {}
        self.overlaps, self.correlations = Mean(), Mean()
        self.dropped = 0

    def answered(self, arm: Arm, milliseconds: float, failed: bool = False) -> None:
        """Count an answer; one that fell back to popular items has failed."""
        with self.lock:
            self.answers[arm] += 1
            self.failed[arm] += failed
            self.now[arm].add(milliseconds, failed)
            if self._window_full():
                self.before, self.now = self.now, _tallies()

    def clicked(self, answer_id: str) -> Arm | None:
        """Count an event that names an answer of this trial, once an answer; return its arm."""
        arm = arm_of(answer_id)
        with self.lock:
            if arm is None or answer_id in self.clicked_ids:
                return arm
            if _trial_of(answer_id) in (0, self.trial):
                self.clicks[arm] += 1
            self.clicked_ids[answer_id] = None
            if len(self.clicked_ids) > REMEMBERED:
                del self.clicked_ids[next(iter(self.clicked_ids))]
        return arm

    def compared(self, champion: Sequence[str], challenger: Sequence[str]) -> float:
        """Take in what both arms answered to one request: item ids, best first.

        Returns the share of items that both have.
        """
        share = overlap(champion, challenger)
        with self.lock:
            self.overlaps.add(share)
            correlation = rank_correlation(champion, challenger)
            if correlation is not None:
                self.correlations.add(correlation)
        return share

    def drop(self) -> None:
        """Count a shadow answer that was not made, since the process had better to do."""
        with self.lock:
            self.dropped += 1

    def recent(self, arm: Arm) -> Tally:
        """Return an arm's newest answers: one window or two."""
        return self.before[arm] + self.now[arm]

    def verdict(self) -> str | None:
        """Return why the challenger has to go, or None while it may stay."""
        with self.lock:
            champion, challenger = (self.recent(arm) for arm in ARMS)
            clicks, answers = dict(self.clicks), dict(self.answers)
        reason = _too_many_errors(champion, challenger, self.bounds)
        if self.mode == "shadow":  # it runs when there is time: slow is no fault; and unseen
            return reason
        reason = reason or _too_slow(champion, challenger, self.bounds)
        return reason or _too_few_clicks(clicks, answers, self.bounds)

    def report(self) -> TrialReport:
        """Return what was counted, for people."""
        compared = None
        if self.mode == "shadow":
            mean = self.correlations
            correlation = mean.value if mean.count else None
            compared = ShadowReport(
                self.overlaps.count, self.overlaps.value, correlation, self.dropped
            )
        champion, challenger = (self._arm_report(arm) for arm in ARMS)
        return TrialReport(self.trial, champion, challenger, compared, self.verdict())

    def _arm_report(self, arm: Arm) -> ArmReport:
        with self.lock:
            latency = self.recent(arm).latency
        p50, p99 = (round(latency.quantile(share), 3) for share in (0.5, 0.99))
        return ArmReport(self.answers[arm], self.failed[arm], self.clicks[arm], p50, p99)

    def _window_full(self) -> bool:
        """Whether both arms can be judged by what is new; a champion that is hardly asked may wait.

        The challenger's errors must not hide behind a window that never ends.
        """
        enough = self.bounds.min_answers
        champion, challenger = (self.now[arm].answers for arm in ARMS)
        return challenger >= enough and (champion >= enough or challenger >= 10 * enough)


class Mean:
    """A running mean.

    >>> mean = Mean()
    >>> mean.add(1.0), mean.add(2.0), mean.value
    (None, None, 1.5)
    """

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def add(self, value: float) -> None:
        """Take in one value."""
        self.count, self.total = self.count + 1, self.total + value

    @property
    def value(self) -> float:
        """The mean; 0.0 of nothing."""
        return self.total / max(1, self.count)


class Job(NamedTuple):
    """A request to answer in shadow, beside what the champion answered."""

    counts: Counts
    challenger: Engine
    request: RecommendRequest
    champions: Sequence[str]


def _ask(engine: Engine, request: RecommendRequest) -> Answer:
    return engine.recommend([request])[0]


class Trial:
    """Follows the deployer from trial to trial: counts, answers in shadow, and ends what is bad.

    `ask` answers a request as the server would; `idle` says whether no request waits. Shadow
    answers are made on a thread of their own in idle moments, few enough waiting, else dropped:
    the champion's answer is out before, and the next one waits at most for one of them to leave
    the interpreter. `on_compared` is told each share of items that both arms answered with,
    `on_return` of each return. The thread has the usual priority, since one of a lower priority
    would be held off while it holds the interpreter's lock, and all others with it.
    """

    def __init__(
        self,
        deployer: Deployer,
        *,
        ask: Callable[[Engine, RecommendRequest], Answer] = _ask,
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        self.deployer, self.ask, self.idle = deployer, ask, idle
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.counts: Counts | None = None
        self.on_compared: Callable[[float], object] = lambda share: None
        self.on_return: Callable[[], object] = lambda: None
        self._follow(deployer.current)
        deployer.on_change(self._follow)
        self.thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self.thread.start()

    def answered(
        self, request: RecommendRequest | RankRequest, answer: Answer | RankAnswer, seconds: float
    ) -> None:
        """Count an answer that was given; where that is on, have it answered in shadow too.

        An answer of a bundle that is no longer on trial does not count.
        """
        counts, roster = self.counts, self.deployer.current
        engine = roster.champion if answer.arm == "champion" else roster.challenger
        if counts is None or engine is None or answer.bundle != engine.version:
            return
        counts.answered(answer.arm, seconds * 1000, failed=answer.fallback is not None)
        modelled = answer.source == "model" and answer.fallback is None
        if counts.mode != "shadow" or not modelled or roster.challenger is None:
            return
        if isinstance(request, RecommendRequest) and isinstance(answer, Answer):
            self._shadow(counts, roster.challenger, request, answer)

    def failed(self, arm: Arm, seconds: float = 0.0) -> None:
        """Count an answer that an arm could not give."""
        if (counts := self.counts) is not None:
            counts.answered(arm, seconds * 1000, failed=True)

    def clicked(self, answer_id: str) -> Arm | None:
        """Count an event that names an answer; return the arm that gave it, None if not ours."""
        counts = self.counts
        return arm_of(answer_id) if counts is None else counts.clicked(answer_id)

    def verdict(self) -> str | None:
        """Return why the present challenger has to go, or None while it may stay."""
        return None if self.counts is None else self.counts.verdict()

    def report(self) -> TrialReport | None:
        """Return how the present trial goes, None without one."""
        return None if self.counts is None else self.counts.report()

    def close(self) -> None:
        """End the thread; close this before the deployer."""
        self.queue.put(None)
        self.thread.join()

    def _follow(self, roster: Roster) -> None:
        """Begin to count anew with each new trial; a changed share goes on with it."""
        counts = self.counts
        if roster.mode == "off":
            self.counts = None
        elif counts is None or (counts.trial, counts.bounds) != (roster.trial, roster.bounds):
            self.counts = Counts(roster.trial, roster.mode, roster.bounds)

    def _shadow(
        self, counts: Counts, challenger: Engine, request: RecommendRequest, answer: Answer
    ) -> None:
        if self.queue.qsize() >= WAITING:
            counts.drop()
            return
        items = [item.item_id for item in answer.items]
        self.queue.put(Job(counts, challenger, request, items))

    def _run(self) -> None:
        use_one_core()
        judged = time.monotonic()
        while True:
            try:
                job = self.queue.get(timeout=JUDGED_EVERY)
                if job is None:
                    return
                self._compare(job)
                del job  # it would hold an engine while this thread waits for the next
            except Empty:
                pass
            if time.monotonic() - judged >= JUDGED_EVERY:
                judged = time.monotonic()
                self._judge()

    def _compare(self, job: Job) -> None:
        counts = job.counts
        if counts is not self.counts:
            return
        if not self._wait_until_idle():
            counts.drop()
            return
        started = time.perf_counter()
        try:
            answer = self.ask(job.challenger, job.request)
        except Exception as error:
            counts.answered("challenger", _since(started), failed=True)
            log.warning("shadow_failed", error=type(error).__name__)
            return
        counts.answered("challenger", _since(started), failed=answer.fallback is not None)
        items = [item.item_id for item in answer.items]
        self.on_compared(counts.compared(job.champions, items))

    def _wait_until_idle(self) -> bool:
        until = time.monotonic() + PATIENCE
        while not (idle := self.idle()) and time.monotonic() < until:
            time.sleep(0.001)
        return idle

    def _judge(self) -> None:
        counts = self.counts
        reason = counts.verdict() if counts else None
        if counts is None or reason is None:
            return
        log.warning("return_to_champion", trial=counts.trial, reason=reason)
        try:
            self.deployer.return_to_champion(counts.trial, reason)
            self.on_return()
        except Exception as error:  # judged again at the next moment
            log.exception("return_failed", error=type(error).__name__)


def overlap(left: Sequence[str], right: Sequence[str]) -> float:
    """Return the share of items that two answers have in common, of the longer one's length.

    >>> overlap(["a", "b", "c", "d"], ["b", "a", "x", "y"])
    0.5
    """
    longest = max(len(left), len(right))
    return len(set(left) & set(right)) / longest if longest else 1.0


def rank_correlation(left: Sequence[str], right: Sequence[str]) -> float | None:
    """Return Spearman's rank correlation over the items of both; None of fewer than two.

    >>> rank_correlation(["a", "b", "c"], ["x", "a", "b", "c"]), rank_correlation("abc", "cba")
    (1.0, -1.0)
    """
    common = set(left) & set(right)
    count = len(common)
    if count < 2:
        return None
    ranks = {item: rank for rank, item in enumerate(i for i in left if i in common)}
    others = enumerate(i for i in right if i in common)
    squares = sum((rank - ranks[item]) ** 2 for rank, item in others)
    return 1 - 6 * squares / (count * (count**2 - 1))


def click_z(clicks: Sequence[int], answers: Sequence[int]) -> float:
    """Return by how many standard deviations the second arm's click-through differs.

    The two-proportion z-test with a pooled variance; 0.0 where nothing can be said.

    >>> round(click_z((100, 60), (1000, 1000)), 3)
    -3.297
    """
    pooled = sum(clicks) / max(1, sum(answers))
    if not all(answers) or not 0 < pooled < 1:
        return 0.0
    deviation = math.sqrt(pooled * (1 - pooled) * sum(1 / count for count in answers))
    return (clicks[1] / answers[1] - clicks[0] / answers[0]) / deviation


def _too_many_errors(champion: Tally, challenger: Tally, bounds: Bounds) -> str | None:
    """Judge once the bound is crossed whatever follows, and not for what fails in both arms."""
    allowed = bounds.max_error_rate * max(challenger.answers, bounds.min_answers)
    if challenger.failed <= allowed or challenger.error_rate <= champion.error_rate:
        return None
    return (
        f"errors: {challenger.failed} of the newest {challenger.answers} answers failed, more than "
        f"{bounds.max_error_rate:.2%} (champion {champion.error_rate:.2%})"
    )


def _too_slow(champion: Tally, challenger: Tally, bounds: Bounds) -> str | None:
    if min(champion.answers, challenger.answers) < bounds.min_answers:
        return None
    theirs, ours = (tally.latency.quantile(0.99) for tally in (champion, challenger))
    if ours <= bounds.max_p99_ratio * theirs:
        return None
    return (
        f"latency: p99 {ours:.2f} ms against the champion's {theirs:.2f} ms, more than "
        f"{bounds.max_p99_ratio:g} times"
    )


def _too_few_clicks(clicks: dict[Arm, int], answers: dict[Arm, int], bounds: Bounds) -> str | None:
    counts = [min(clicks[arm], answers[arm]) for arm in ARMS]
    of = [answers[arm] for arm in ARMS]
    if min(of) < bounds.min_answers or click_z(counts, of) >= -CERTAIN:
        return None
    rates = [count / total for count, total in zip(counts, of, strict=True)]
    if rates[1] >= bounds.min_click_ratio * rates[0]:
        return None
    return (
        f"click-through: {rates[1]:.2%} of {of[1]} answers against the champion's {rates[0]:.2%} "
        f"of {of[0]}, below {bounds.min_click_ratio:g} of it beyond chance"
    )


def _tallies() -> dict[Arm, Tally]:
    return {arm: Tally() for arm in ARMS}


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
