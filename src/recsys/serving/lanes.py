"""Threads that answer for the event loop: each takes all that waits, up to a few, as one batch.

A batch costs less than its requests one by one (the fixed cost of numpy calls is paid once), and
nobody waits for one to fill: a thread that is free takes what there is. A job that is alone and
will be quick is answered on the loop itself: to wake a thread and be woken by it costs .1 to .2 ms.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_STOP: Any = object()
QUICK_SECONDS = 0.003
"""So long the loop may be held up; other connections wait meanwhile."""
FORGETS = 0.9
"""What an answer's time still counts after each further one."""


class Lanes(Generic[Job, Result]):
    """Hands jobs from one event loop to `threads` threads that call `work` on up to `together`.

    `work` returns one result a job, or an exception in its place; if it raises, every job of the
    batch fails with that. `prepare` runs in each thread before its first job. A job that
    `light` approves of is answered on the loop, each time after `prepare`, while nothing else waits
    and answers are quick: none was slow lately, and so many were given that one would have shown.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Result | BaseException]],
        threads: int = 1,
        together: int = 8,
        name: str = "lane",
        prepare: Callable[[], None] | None = None,
        light: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self.work, self.together, self.prepare, self.light = work, together, prepare, light
        self.queue: SimpleQueue[tuple[Job, asyncio.Future[Result]]] = SimpleQueue()
        self.arrived: list[tuple[Job, asyncio.Future[Result]]] = []
        self.pending, self.slowest, self.pace = 0, 1.0, 0.0
        self.threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def wait(self) -> float:
        """Return the seconds that a further job would wait, by what jobs have taken of late."""
        return self.pending * self.pace / len(self.threads)

    def submit(self, job: Job) -> asyncio.Future[Result]:
        """Return a future of the job's result; call it on the event loop only.

        A job whose future is done (its caller gave up) before a thread takes it is passed over.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self.pending += 1
        if not self.arrived:
            loop.call_soon(self._hand)
        self.arrived.append((job, future))
        return future

    def close(self) -> None:
        """Let the threads end after what waits."""
        for _ in self.threads:
            self.queue.put(_STOP)
        for thread in self.threads:
            thread.join()

    def _hand(self) -> None:
        """Answer what arrived in this turn of the loop: here, or on the threads."""
        arrived, self.arrived = self.arrived, []
        alone = len(arrived) == self.pending == 1
        if alone and self.slowest < QUICK_SECONDS and self.light(arrived[0][0]):
            if self.prepare:
                self.prepare()
            self._settle(1, *self._answered(arrived))
            return
        for one in arrived:
            self.queue.put(one)

    def _run(self) -> None:
        if self.prepare:
            self.prepare()
        while (first := self.queue.get()) is not _STOP:
            self._answer([first, *self._more()])

    def _more(self) -> Iterator[tuple[Job, asyncio.Future[Result]]]:
        """Take what waits, but leave the other threads their share of it."""
        share = -(-self.queue.qsize() // len(self.threads))
        with suppress(Empty):  # another thread may have been faster
            for _ in range(min(self.together - 1, share)):
                if (more := self.queue.get_nowait()) is _STOP:
                    self.queue.put(_STOP)
                    return
                yield more

    def _answer(self, taken: list[tuple[Job, asyncio.Future[Result]]]) -> None:
        answered = self._answered(taken)
        loop = taken[0][1].get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._settle, len(taken), *answered)

    def _answered(
        self, taken: list[tuple[Job, asyncio.Future[Result]]]
    ) -> tuple[list[asyncio.Future[Result]], Sequence[Result | BaseException]]:
        """Return the futures that still wait, and their results."""
        wanted = [(job, future) for job, future in taken if not future.done()]
        began = time.perf_counter()
        try:
            results = self.work([job for job, _ in wanted]) if wanted else []
        except BaseException as error:  # a thread that ends would leave its callers waiting
            results = [error] * len(wanted)
        if wanted:  # jobs that were given up say nothing of how long one takes
            self._learn(time.perf_counter() - began, len(wanted))
        return [future for _, future in wanted], results

    def _learn(self, spent: float, jobs: int) -> None:
        self.slowest = max(FORGETS * self.slowest, spent)
        self.pace = FORGETS * self.pace + (1 - FORGETS) * spent / jobs

    def _settle(
        self,
        taken: int,
        futures: list[asyncio.Future[Result]],
        results: Sequence[Result | BaseException],
    ) -> None:
        self.pending -= taken
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
