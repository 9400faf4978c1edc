"""Who sees a challenger, what is counted of it, and the verdicts that end its trial."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from recsys.serving.deployment import Bounds, Deployer, Mode, Record, Roster
from recsys.serving.engine import Engine
from recsys.serving.messages import Answer, Recommended, RecommendRequest
from recsys.serving.trial import (
    FASTEST_MS,
    WAITING,
    Counts,
    Histogram,
    Trial,
    arm_of,
    choose,
    click_z,
    new_answer_id,
    overlap,
    rank_correlation,
)
from tiny_bundles import write_tiny_bundle

BOUNDS = Bounds(max_error_rate=0.02, max_p99_ratio=1.5, min_click_ratio=0.9, min_answers=1000)
USERS = [f"user {number}" for number in range(20_000)]


def engine(version: str) -> Engine:
    """Stands for an engine where only its name matters."""
    return cast(Engine, SimpleNamespace(version=version))


def roster(mode: Mode = "canary", share: float = 0.1, challenger: str = "b", **more: Any) -> Roster:
    return Roster(engine("a"), None, engine(challenger), mode, share, **more)


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)


# Answer ids


def test_answer_ids() -> None:
    ids = [new_answer_id("challenger", 7) for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {arm_of(answer_id) for answer_id in ids} == {"challenger"}
    assert arm_of(new_answer_id("champion")) == "champion"


@pytest.mark.parametrize(
    "text", ["", "x", "x-", "c", "-", "y1-00", "xx-1", "x-1-2", "x²-1", "c 1-"]
)
def test_ids_of_others(text: str) -> None:
    assert arm_of(text) is None
    assert Counts(1, "canary", BOUNDS).clicked(text) is None


def test_ids_of_a_forked_process_are_its_own() -> None:
    read, write = os.pipe()
    mine = new_answer_id("champion")
    if (child := os.fork()) == 0:
        os.write(write, new_answer_id("champion").encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 100).decode()
    os.close(read), os.close(write)
    assert mine[:19] != theirs[:19]
    assert arm_of(theirs) == "champion"


def test_ids_of_threads() -> None:
    ids: list[str] = []
    work = lambda: ids.extend(new_answer_id("champion") for _ in range(2000))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 8000


# Who is shown what


def shown(of: Roster) -> set[str]:
    return {user for user in USERS if choose(of, user) == "challenger"}


def test_a_share_of_users() -> None:
    tenth, fifth = shown(roster(share=0.1)), shown(roster(share=0.2))
    assert len(tenth) / len(USERS) == pytest.approx(0.1, abs=0.01)
    assert len(fifth) / len(USERS) == pytest.approx(0.2, abs=0.01)
    assert tenth < fifth
    assert tenth == shown(roster(share=0.1))


def test_no_share_and_all() -> None:
    assert shown(roster(share=0.0)) == set()
    assert shown(roster(share=1.0)) == set(USERS)


def test_another_challenger_is_shown_to_others() -> None:
    first, second = shown(roster(challenger="b")), shown(roster(challenger="c"))
    assert len(first & second) / len(first) == pytest.approx(0.1, abs=0.03)


def test_champion_for_the_unnamed_and_outside_of_a_canary() -> None:
    assert choose(roster(share=1.0), None) == "champion"
    assert shown(roster("shadow", 1.0)) == shown(roster("off", 1.0)) == set()
    assert choose(Roster(engine("a"), mode="canary", share=1.0), "u") == "champion"
    assert choose(roster(share=1.0), "\ud800") == "challenger"


def test_the_same_in_every_process() -> None:
    code = """
from types import SimpleNamespace
from recsys.serving.trial import choose
b = SimpleNamespace(version="b")
r = SimpleNamespace(mode="canary", share=0.3, challenger=b)
print([n for n in range(60) if choose(r, f"user {n}") == "challenger"])
"""
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    here = [n for n in range(60) if choose(roster(share=0.3), f"user {n}") == "challenger"]
    assert done.stdout.strip() == str(here) == str(SHOWN)


SHOWN = [0, 3, 4, 9, 11, 19, 23, 25, 35, 36, 44, 46, 47, 51, 52, 55, 56, 59]
"""Numbers of the first 60 users who are shown the challenger b at a share of .3, for good."""


# What is measured


def test_quantiles_are_near_the_true_ones() -> None:
    times = np.random.default_rng(0).lognormal(1, 1, 20_000)
    histogram = Histogram()
    for milliseconds in times:
        histogram.add(float(milliseconds))
    for share in (0.01, 0.5, 0.9, 0.99):
        assert histogram.quantile(share) == pytest.approx(np.quantile(times, share), rel=0.03)


def test_quantiles_at_the_ends() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.99) == 0.0
    for milliseconds in (-1.0, 0.0, FASTEST_MS, 1e9):
        histogram.add(milliseconds)
    assert histogram.quantile(0.5) == pytest.approx(FASTEST_MS, rel=0.03)
    assert histogram.quantile(1.0) > 80_000
    assert (histogram + histogram).quantile(0.5) == histogram.quantile(0.5)


def test_overlap_and_rank_correlation() -> None:
    assert overlap(list("abcd"), list("dcba")) == 1.0
    assert overlap(list("abcd"), list("ab")) == 0.5
    assert overlap([], []) == 1.0
    assert overlap(list("ab"), list("xy")) == 0.0
    assert rank_correlation(list("abcd"), list("abdc")) == pytest.approx(0.8)
    assert rank_correlation(list("abcx"), list("ycba")) == -1.0
    assert rank_correlation(list("ab"), list("ax")) is None


def test_click_z_against_a_textbook() -> None:
    # 100 of 1,000 against 60 of 1,000: pooled .08, standard error .012133
    assert click_z((100, 60), (1000, 1000)) == pytest.approx(-0.04 / 0.0121326, rel=1e-4)
    assert click_z((60, 100), (1000, 1000)) == pytest.approx(3.2969, rel=1e-4)
    assert click_z((0, 0), (1000, 1000)) == click_z((5, 0), (10, 0)) == 0.0
    assert click_z((10, 10), (10, 10)) == 0.0


# Verdicts


def counted(
    champion: tuple[int, int, int] = (1000, 0, 100),
    challenger: tuple[int, int, int] = (1000, 0, 100),
    milliseconds: tuple[float, float] = (2.0, 2.0),
    mode: Mode = "canary",
    bounds: Bounds = BOUNDS,
) -> Counts:
    """Return counts of answers, failed ones and clicks of each arm."""
    counts = Counts(3, mode, bounds)
    arms = zip(("champion", "challenger"), (champion, challenger), milliseconds, strict=True)
    for arm, (answers, failed, clicks), took in arms:
        for place in range(answers):
            counts.answered(arm, took, failed=place < failed)
        for _ in range(clicks):
            counts.clicked(new_answer_id(arm, 3))
    return counts


def test_alike_is_well() -> None:
    assert counted().verdict() is None


@pytest.mark.parametrize(
    ("answers", "failed", "ends"),
    [
        (1000, 20, False),  # just 2 %
        (1000, 21, True),
        (21, 21, True),  # it can only be over 2 % of the first 1,000
        (20, 20, False),
        (2000, 40, False),
        (2000, 41, True),
    ],
)
def test_errors_out_of_bounds(answers: int, failed: int, ends: bool) -> None:
    verdict = counted(challenger=(answers, failed, answers // 10)).verdict()
    assert (verdict is not None) is ends
    assert verdict is None or verdict.startswith(f"errors: {failed} of the newest {answers} ")


def test_errors_of_both_arms_are_no_fault_of_the_challenger() -> None:
    assert counted((1000, 500, 100), (1000, 500, 100)).verdict() is None
    assert counted((1000, 500, 100), (1000, 501, 100)).verdict() is not None


def test_a_challenger_that_turns_bad_late() -> None:
    counts = counted((1000, 0, 0), (1000, 0, 0))
    for _ in range(50_000):
        counts.answered("champion", 2.0)
        counts.answered("challenger", 2.0)
    failed = 0
    while counts.verdict() is None and failed < 100:
        counts.answered("challenger", 2.0, failed=True)
        failed += 1
    assert 20 < failed <= 42  # of the newest 1,000 to 2,000


@pytest.mark.parametrize(
    ("slow", "answers", "ends"), [(2.8, 1000, False), (3.4, 1000, True), (3.4, 999, False)]
)
def test_latency_out_of_bounds(slow: float, answers: int, ends: bool) -> None:
    counts = counted(challenger=(answers, 0, answers // 10), milliseconds=(2.0, slow))
    assert (counts.verdict() is not None) is ends
    if ends:
        assert str(counts.verdict()).startswith("latency: p99 3.39 ms against the champion's 2.0")


def test_latency_is_judged_at_the_99th_percentile() -> None:
    for slow, ends in ((9, False), (11, True)):
        counts = counted((1000, 0, 0), (1000 - slow, 0, 0))
        for _ in range(slow):
            counts.answered("challenger", 100.0)
        assert (counts.verdict() is not None) is ends


@pytest.mark.parametrize(
    ("clicks", "ends"),
    [
        (100, False),
        (130, False),
        (90, False),  # z = -.76: chance
        (71, False),  # z = -2.32
        (70, True),  # z = -2.41
    ],
)
def test_click_through_out_of_bounds(clicks: int, ends: bool) -> None:
    verdict = counted(challenger=(1000, 0, clicks)).verdict()
    assert (verdict is not None) is ends
    if ends:
        assert str(verdict).startswith("click-through: 7.00% of 1000 answers against")


def test_click_through_that_is_surely_but_hardly_lower() -> None:
    counts = counted((40_000, 0, 20_000), (40_000, 0, 18_800))  # z = -8.5, ratio .94
    assert click_z((20_000, 18_800), (40_000, 40_000)) < -8
    assert counts.verdict() is None


def test_click_through_of_too_few_answers() -> None:
    assert counted((5000, 0, 2500), (999, 0, 0)).verdict() is None
    assert counted((999, 0, 500), (5000, 0, 0)).verdict() is None
    assert counted((1000, 0, 500), (1000, 0, 0)).verdict() is not None


def test_only_the_first_click_on_an_answer_of_this_trial_counts() -> None:
    counts = Counts(3, "canary", BOUNDS)
    mine, before, unnumbered = (new_answer_id("challenger", trial) for trial in (3, 2, 0))
    for answer_id in (mine, mine, before, unnumbered, "somebody else's"):
        counts.clicked(answer_id)
    assert counts.clicks == {"champion": 0, "challenger": 2}
    assert counts.clicked(before) == "challenger"


def test_slow_in_shadow_is_no_fault_and_failing_is() -> None:
    assert counted(milliseconds=(2.0, 50.0), mode="shadow").verdict() is None
    assert counted(challenger=(1000, 21, 0), mode="shadow").verdict() is not None


def test_counts_of_several_threads_add_up() -> None:
    counts = Counts(1, "canary", Bounds(min_answers=10_000))
    work = lambda: [counts.answered("champion", 1.0) for _ in range(2000)]  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.answers["champion"] == counts.recent("champion").answers == 8000


# A running trial


class Deploying:
    """Stands for a deployer: holds a roster, and notes who was sent back."""

    def __init__(self, current: Roster) -> None:
        self.current, self.returned, self.listeners = current, list[tuple[int, str]](), []

    def on_change(self, tell: Callable[[Roster], None]) -> None:
        self.listeners.append(tell)

    def return_to_champion(self, trial: int, why: str) -> None:
        self.returned.append((trial, why))
        self.use(Roster(self.current.champion))

    def use(self, current: Roster) -> None:
        self.current = current
        for tell in self.listeners:
            tell(current)


def answer(items: str = "abcd", **facts: Any) -> Answer:
    shown = [Recommended(item, 1.0) for item in items]
    return Answer(shown, **({"source": "model", "bundle": "a", "timings_ms": {}} | facts))


REQUEST = RecommendRequest(user_id="u")


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[Trial, Deploying]]]:
    """Start trials that end with the test."""
    trials = []

    def start(of: Roster, **more: Any) -> tuple[Trial, Deploying]:
        deploying = Deploying(of)
        trials.append(Trial(cast(Deployer, deploying), **more))
        return trials[-1], deploying

    yield start
    for trial in trials:
        trial.close()


def test_nothing_is_counted_without_a_trial(started: Any) -> None:
    trial, _ = started(Roster(engine("a")))
    trial.answered(REQUEST, answer(), 0.001)
    trial.failed("challenger")
    assert trial.clicked(new_answer_id("champion")) == "champion"
    assert (trial.report(), trial.verdict()) == (None, None)


def test_a_canary_is_counted(started: Any) -> None:
    trial, _ = started(roster(trial=3))
    trial.answered(REQUEST, answer(), 0.002)
    trial.answered(REQUEST, answer(arm="challenger", bundle="b"), 0.004)
    trial.answered(REQUEST, answer(arm="challenger", bundle="b", fallback="deadline"), 0.004)
    trial.answered(REQUEST, answer(arm="challenger", bundle="one before"), 0.004)
    trial.failed("challenger", 0.004)
    trial.clicked(new_answer_id("challenger", 3))
    report = trial.report()
    assert (report.trial, report.champion.answers, report.champion.failed) == (3, 1, 0)
    assert (report.challenger.answers, report.challenger.failed) == (3, 2)
    assert (report.challenger.clicked, report.shadow) == (1, None)
    assert report.champion.p99_ms == pytest.approx(2, rel=0.03)
    assert report.challenger.p50_ms == pytest.approx(4, rel=0.03)


def test_a_new_trial_begins_anew_and_a_larger_share_does_not(started: Any) -> None:
    trial, deploying = started(roster(trial=3))
    trial.answered(REQUEST, answer(), 0.002)
    deploying.use(roster(share=0.5, trial=3, generation=4))
    assert trial.report().champion.answers == 1
    deploying.use(roster(trial=5))
    assert trial.report().champion.answers == 0
    deploying.use(roster("off"))
    assert trial.report() is None


def test_shadow_compares(started: Any) -> None:
    asked: list[tuple[str, RecommendRequest]] = []

    def ask(engine: Engine, request: RecommendRequest) -> Answer:
        asked.append((engine.version, request))
        return answer("bay", bundle="b")

    trial, _ = started(roster("shadow", trial=3), ask=ask)
    trial.answered(REQUEST, answer("abcd"), 0.002)
    trial.answered(REQUEST, answer("abcd", source="popular"), 0.002)
    trial.answered(REQUEST, answer("abcd", fallback="deadline"), 0.002)
    wait_for(lambda: trial.report().shadow.compared == 1)
    report = trial.report()
    assert asked == [("b", REQUEST)]
    assert (report.shadow.overlap, report.shadow.rank_correlation) == (0.5, -1.0)
    assert (report.champion.answers, report.challenger.answers) == (3, 1)


def test_shadow_never_holds_up_the_champion(started: Any) -> None:
    free = threading.Event()
    asked: list[str] = []

    def ask(engine: Engine, request: RecommendRequest) -> Answer:
        asked.append(engine.version)
        free.wait(10)
        return answer(bundle="b")

    trial, _ = started(roster("shadow"), ask=ask)
    trial.answered(REQUEST, answer(), 0.002)
    wait_for(lambda: bool(asked))
    begin = time.perf_counter()
    for _ in range(500):
        trial.answered(REQUEST, answer(), 0.002)
    took = time.perf_counter() - begin
    free.set()
    wait_for(lambda: trial.report().shadow.compared == 1 + WAITING)
    assert trial.report().shadow.dropped == 500 - WAITING
    assert took < 0.5  # one wait would take ten seconds


def test_shadow_waits_for_a_quiet_moment_and_then_gives_up(started: Any) -> None:
    trial, _ = started(roster("shadow"), ask=lambda *_: answer(), idle=lambda: False)
    trial.answered(REQUEST, answer(), 0.002)
    wait_for(lambda: trial.report().shadow.dropped == 1)
    trial.idle = lambda: True
    trial.answered(REQUEST, answer(), 0.002)
    wait_for(lambda: trial.report().shadow.compared == 1)


def test_a_challenger_that_fails_in_shadow_is_sent_back(started: Any) -> None:
    def ask(engine: Engine, request: RecommendRequest) -> Answer:
        raise RuntimeError("broken")

    trial, deploying = started(roster("shadow", trial=9, bounds=Bounds(min_answers=100)), ask=ask)
    for _ in range(10):
        trial.answered(REQUEST, answer(), 0.002)
    wait_for(lambda: bool(deploying.returned))
    assert deploying.returned[0][0] == 9
    assert deploying.returned[0][1].startswith("errors: ")
    assert trial.report() is None


def test_jobs_of_an_ended_trial_are_passed_over(started: Any) -> None:
    free, asked = threading.Event(), []

    def ask(engine: Engine, request: RecommendRequest) -> Answer:
        asked.append(engine.version)
        free.wait(10)
        return answer()

    trial, deploying = started(roster("shadow", trial=1), ask=ask)
    for _ in range(5):
        trial.answered(REQUEST, answer(), 0.002)
    wait_for(lambda: asked == ["b"])
    deploying.use(roster("shadow", challenger="c", trial=2))
    trial.answered(REQUEST, answer(), 0.002)
    free.set()
    wait_for(lambda: trial.report().shadow.compared == 1)
    assert asked == ["b", "c"]


def test_a_bad_canary_is_taken_back_everywhere(tmp_path: Path) -> None:
    """Two workers with real bundles: one meets the errors, both return, the record says why."""
    paths = [write_tiny_bundle(tmp_path / name, dim=dim) for name, dim in (("a", 8), ("b", 6))]
    Record(tmp_path).begin(paths[0])
    workers = [Deployer(tmp_path, every=0.02) for _ in range(2)]
    trials = [Trial(worker) for worker in workers]
    try:
        workers[0].challenge(paths[1], "canary", 0.5, bounds=Bounds(min_answers=100))
        # A worker shows its new mode just before its trial begins, and just before it ends.
        wait_for(lambda: trials[1].report() is not None)
        for user in range(40):
            arm = choose(workers[1].current, f"u{user}")
            if arm == "challenger":
                trials[1].failed(arm)
        wait_for(lambda: all(worker.current.mode == "off" for worker in workers))
        wait_for(lambda: [trial.report() for trial in trials] == [None, None])
        change = Record(tmp_path).read().history[-1]
        assert (change.what, change.by) == ("return to champion", "trial")
        assert change.why.startswith("errors: ")
        assert choose(workers[0].current, "u1") == "champion"
    finally:
        for one in (*trials, *workers):
            one.close()
