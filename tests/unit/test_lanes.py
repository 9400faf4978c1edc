"""Lanes: every job gets its own result, whatever the batch it travelled in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

import pytest

from recsys.serving.lanes import Lanes


def test_every_job_gets_its_own_result_and_batches_stay_small() -> None:
    sizes: list[int] = []

    def work(jobs: Sequence[int]) -> list[int]:
        sizes.append(len(jobs))
        time.sleep(0.001)
        return [job * job for job in jobs]

    async def main() -> list[int]:
        lanes: Lanes[int, int] = Lanes(work, threads=2, together=4)
        results = await asyncio.gather(*(lanes.submit(n) for n in range(200)))
        assert lanes.pending == 0
        lanes.close()
        return results

    assert asyncio.run(main()) == [n * n for n in range(200)]
    assert sum(sizes) == 200
    assert 1 < max(sizes) <= 4


def test_a_batch_is_what_waits_and_no_more() -> None:
    held, batches = threading.Event(), []

    def work(jobs: Sequence[int]) -> list[int]:
        held.wait()
        batches.append(list(jobs))
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[int, int] = Lanes(work, together=3)
        futures = [lanes.submit(0)]
        await asyncio.sleep(0.05)
        futures += [lanes.submit(n) for n in (1, 2, 3, 4)]
        assert lanes.pending == 5
        held.set()
        await asyncio.gather(*futures)
        lanes.close()

    asyncio.run(main())
    assert batches == [[0], [1, 2, 3], [4]]


class Stale(SimpleQueue):
    """Says that one more waits, as a queue does whose last job another thread takes just now."""

    def qsize(self) -> int:
        return 1

    def empty(self) -> bool:
        return False


def test_no_thread_waits_for_a_job_that_another_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.serving.lanes.SimpleQueue", Stale)

    async def main() -> int:
        lanes: Lanes[int, int] = Lanes(list)
        return await asyncio.wait_for(lanes.submit(7), 10)

    assert asyncio.run(main()) == 7


def test_one_failure_is_its_own_and_a_crash_is_everybodys() -> None:
    def work(jobs: Sequence[str]) -> list[str | BaseException]:
        if "crash" in jobs:
            raise RuntimeError("crash")
        return [ValueError(job) if job == "bad" else job for job in jobs]

    async def main() -> None:
        lanes: Lanes[str, str] = Lanes(work)
        good, bad = lanes.submit("good"), lanes.submit("bad")
        assert await good == "good"
        with pytest.raises(ValueError, match="bad"):
            await bad
        with pytest.raises(RuntimeError, match="crash"):
            await lanes.submit("crash")
        assert await lanes.submit("again") == "again"
        assert lanes.pending == 0
        lanes.close()

    asyncio.run(main())


def test_a_job_given_up_before_its_turn_is_passed_over() -> None:
    held, done = threading.Event(), []

    def work(jobs: Sequence[int]) -> list[int]:
        held.wait()
        done.extend(jobs)
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[int, int] = Lanes(work, together=1)
        first = lanes.submit(1)
        await asyncio.sleep(0.02)
        second, third = lanes.submit(2), lanes.submit(3)
        second.cancel()
        held.set()
        assert await asyncio.gather(first, third) == [1, 3]
        lanes.close()
        assert lanes.pending == 0

    asyncio.run(main())
    assert done == [1, 3]


def test_a_quick_job_that_is_alone_is_answered_on_the_loop() -> None:
    """Once others were; one of several, or a heavy one, is for a thread."""
    where: list[str] = []

    def work(jobs: Sequence[int]) -> list[int]:
        where.extend(threading.current_thread().name for _ in jobs)
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[int, int] = Lanes(work, name="lane", light=lambda job: job > 0)
        for _ in range(10):  # nothing is known of them yet
            await lanes.submit(1)
        assert set(where) == {"lane-0"}
        lanes.slowest = 0.0
        await lanes.submit(1)
        assert where[-1] == threading.current_thread().name
        where.clear()
        lanes.slowest = 0.0
        await asyncio.gather(*(lanes.submit(n) for n in (1, 2, 3)))
        await lanes.submit(0)
        assert set(where) == {"lane-0"}
        assert lanes.pending == 0
        lanes.close()

    asyncio.run(main())


def test_after_a_slow_answer_the_loop_is_left_alone() -> None:
    where: list[str] = []

    def work(jobs: Sequence[float]) -> list[float]:
        time.sleep(jobs[0])
        where.append(threading.current_thread().name)
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[float, float] = Lanes(work, name="lane", light=lambda job: True)
        lanes.slowest = 0.0
        for seconds in (0.05, 0.0, 0.05):
            await lanes.submit(seconds)
        assert where == [threading.current_thread().name, "lane-0", "lane-0"]
        lanes.close()

    asyncio.run(main())


def test_a_job_that_fails_on_the_loop_fails_alone() -> None:
    def work(jobs: Sequence[int]) -> list[int]:
        if jobs[0] < 0:
            raise ValueError("negative")
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[int, int] = Lanes(work, light=lambda job: True)
        lanes.slowest = 0.0
        with pytest.raises(ValueError, match="negative"):
            await lanes.submit(-1)
        assert await lanes.submit(2) == 2
        assert lanes.pending == 0
        lanes.close()

    asyncio.run(main())


def test_how_long_a_further_job_would_wait_follows_what_jobs_take() -> None:
    def work(jobs: Sequence[int]) -> list[int]:
        time.sleep(0.02 * len(jobs))
        return list(jobs)

    async def main() -> None:
        lanes: Lanes[int, int] = Lanes(work, threads=2, together=4)
        assert lanes.wait == 0.0
        for _ in range(40):
            await lanes.submit(1)
        assert lanes.pace > 0.015
        lanes.pending = 6
        assert lanes.wait == pytest.approx(3 * lanes.pace)
        lanes.pending = 0
        lanes.close()

    asyncio.run(main())
