"""Threads that answer for the event loop: each takes all that waits, up to a few, as one batch.

A batch costs less than its requests one by one (the fixed cost of numpy calls is paid once), and
nobody waits for one to fill: a thread that is free takes what there is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_STOP: Any = object()


class Lanes(Generic[Job, Result]):
    """Hands jobs from one event loop to `threads` threads that call `work` on up to `together`.

    `work` returns one result a job, or an exception in its place; if it raises, every job of the
    batch fails with that. `prepare` runs once in each thread before its first job.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Result | BaseException]],
        threads: int = 1,
        together: int = 8,
        name: str = "lane",
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.work, self.together, self.prepare = work, together, prepare
        self.queue: SimpleQueue[tuple[Job, asyncio.Future[Result]]] = SimpleQueue()
        self.pending = 0
        self.threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job) -> asyncio.Future[Result]:
        """Return a future of the job's result; call it on the event loop only.

        A job whose future is done (its caller gave up) before a thread takes it is passed over.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.pending += 1
        self.queue.put((job, future))
        return future

    def close(self) -> None:
        """Let the threads end after what waits."""
        for _ in self.threads:
            self.queue.put(_STOP)
        for thread in self.threads:
            thread.join()

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
        wanted = [(job, future) for job, future in taken if not future.done()]
        try:
            results = self.work([job for job, _ in wanted]) if wanted else []
        except BaseException as error:  # a thread that ends would leave its callers waiting
            results = [error] * len(wanted)
        loop = taken[0][1].get_loop()
        if not loop.is_closed():
            futures = [future for _, future in wanted]
            loop.call_soon_threadsafe(self._settle, len(taken), futures, results)

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
