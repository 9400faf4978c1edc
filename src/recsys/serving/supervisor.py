"""The process that holds the port and keeps N worker processes alive, and does nothing else.

It loads no model and answers no request: whatever breaks a worker does not reach it. Workers
inherit the bound socket, so a connection is taken by whichever has time, and none is refused while
one of them is started again. What a worker inherits is its `Seat`; how it uses it is `work`.
"""

from __future__ import annotations

import json
import mmap
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from recsys.schema import InputError
from recsys.serving.state import StateUnavailable

log = structlog.get_logger("recsys.serving")
SEAT = "RECSYS_WORKER_SEAT"
METRICS = "PROMETHEUS_MULTIPROC_DIR"
HELD = "held"
STOPPING = (signal.SIGTERM, signal.SIGINT)
SOON_SECONDS = 1.0
"""A worker that dies sooner than this after it was ready is started again with a pause."""
PAUSES = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds before a worker is started again after its first, second, … such death."""
INPUT_ERROR = 2
"""Exit code of a worker that met something given that is wrong."""
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A worker computes on as many threads as it has lanes: libraries that add their own stall it."""
AWAY = (1 << 31) - 1
"""The count of a worker that takes no connections."""
Facts = dict[str, Any]


class Held:
    """How many connections each worker holds, in memory that all of them see.

    >>> with tempfile.NamedTemporaryFile() as file:
    ...     ours, theirs = (Held(Path(file.name), number, workers=2) for number in (0, 1))
    ...     ours.set(3)
    ...     theirs.set(2)
    ...     ours.others_hold_less(), theirs.others_hold_less()
    (True, False)
    """

    def __init__(self, file: Path, number: int, workers: int) -> None:
        with file.open("a+b") as opened:
            opened.truncate(4 * workers)
            self.counts = memoryview(mmap.mmap(opened.fileno(), 4 * workers)).cast("i")
        self.number = number
        self.others = [other for other in range(workers) if other != number]
        self.set(AWAY)

    def set(self, count: int) -> None:
        """Tell the others how many this one holds."""
        self.counts[self.number] = count

    def others_hold_less(self) -> bool:
        """Whether another worker should take the next connection."""
        mine = self.counts[self.number]
        return any(self.counts[other] < mine for other in self.others)


@dataclass(frozen=True)
class Seat:
    """What a worker inherits: its number from 0, three open files, and what it is told to do.

    `listener` is the bound socket. The worker says on `report` that it is ready. `life` gives
    nothing until its end, which is the supervisor's. A worker that is started again has the number
    of the one that died. `given` is any text. `folder` ends with the supervisor: it holds the
    files of Prometheus, and what the workers share.
    """

    number: int
    workers: int
    listener: int
    report: int
    life: int
    given: str
    folder: str

    @classmethod
    def taken(cls) -> Seat:
        """Return this process's seat, which its own children do not see."""
        return cls(**json.loads(os.environ.pop(SEAT)))

    def held(self) -> Held:
        """Return the counts of connections, this worker's set to AWAY."""
        return Held(Path(self.folder) / HELD, self.number, self.workers)

    def ready(self, facts: Facts) -> None:
        """Tell the supervisor that this worker takes requests, and what there is to know of it."""
        self._report({"ready": facts})

    def failed(self, message: str) -> None:
        """Tell the supervisor what a person has to put right."""
        self._report({"error": message})

    def _report(self, said: Facts) -> None:
        os.write(self.report, json.dumps(said).encode() + b"\n")

    def follow(self) -> None:
        """End this process at once when the supervisor ends without having stopped it.

        Otherwise the workers of a killed server would hold its port, and its next start fail.
        """
        threading.Thread(target=self._follow, name="life", daemon=True).start()

    def _follow(self) -> None:
        os.read(self.life, 1)
        # Who made this folder can no longer remove it.
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


def work(serve: Callable[[Seat], None]) -> int:
    """Be a worker until told to stop; return the exit code.

    `serve` takes its requests from `socket.socket(fileno=seat.listener)`, calls `seat.ready` when
    it does, stops at SIGTERM, and raises InputError or StateUnavailable where it cannot start.
    """
    seat = Seat.taken()
    seat.follow()
    try:
        serve(seat)
    except (InputError, StateUnavailable) as error:
        seat.failed(str(error))
        return INPUT_ERROR
    return 0


class Worker:
    """One seat and the process that has it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.report: int | None = None
        self.said = b""
        self.facts: Facts | None = None
        self.error: str | None = None
        self.ready_at = 0.0
        self.start_at: float | None = None
        self.deaths = 0

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self.process
        return self.process.pid

    def died(self, now: float) -> None:
        """Note a death, and when to start again."""
        lived = now - self.ready_at if self.facts is not None else 0.0
        self.deaths = self.deaths + 1 if lived < SOON_SECONDS else 1
        self.process, self.facts = None, None
        self.start_at = now + PAUSES[min(self.deaths, len(PAUSES)) - 1]


class Supervisor:
    """Starts the workers of one socket, starts them again, and stops them.

    `listener` is bound. `command` runs a worker, which ends in `work`; `given` reaches it in its
    seat. A stop lasts `stop_seconds` at most: the drain's, and some more.
    """

    def __init__(
        self,
        listener: socket.socket,
        command: Sequence[str],
        given: str,
        *,
        workers: int,
        stop_seconds: float,
    ) -> None:
        assert workers > 0
        self.listener, self.command, self.given = listener, list(command), given
        self.workers = [Worker(number) for number in range(workers)]
        self.stop_seconds = stop_seconds
        self.folder = ""
        self.life: int | None = None
        self.selector = selectors.DefaultSelector()
        self.signals: list[int] = []
        self.announced = False

    def run(self, announce: Callable[[list[Facts]], None]) -> None:
        """Serve until SIGTERM or SIGINT; `announce` what the workers said once all are ready.

        Raises InputError where a worker cannot start for the first time.
        """
        with self._own_folder(), self._lifeline(), self._hearing():
            try:
                for worker in self.workers:
                    self._start(worker)
                self._watch(announce)
            finally:
                self._stop()

    # Beginning and end.
    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        # In memory where that is possible: a page that the disk is writing holds up who counts.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = tempfile.mkdtemp(prefix="recsys-serving-", dir=memory)
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _lifeline(self) -> Iterator[None]:
        """Hold the one end of a pipe whose other end every worker watches."""
        self.life, held = os.pipe()
        try:
            yield
        finally:
            os.close(held)
            os.close(self.life)

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Wake up for signals, and for the end of a worker."""
        heard, waker = socket.socketpair()
        for end in (heard, waker):
            end.setblocking(False)
        self.selector.register(heard, selectors.EVENT_READ, None)
        numbers = (*STOPPING, signal.SIGCHLD)
        handlers = {number: signal.signal(number, self._hear) for number in numbers}
        fd = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.selector.close()
            heard.close()
            waker.close()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number in STOPPING:
            self.signals.append(number)

    # While it runs.
    def _watch(self, announce: Callable[[list[Facts]], None]) -> None:
        while not self.signals:
            self._wait(self._pause())
            for worker in self.workers:
                self._look_after(worker)
            self._announce_once(announce)

    def _announce_once(self, announce: Callable[[list[Facts]], None]) -> None:
        facts = [worker.facts for worker in self.workers if worker.facts is not None]
        if not self.announced and len(facts) == len(self.workers):
            self.announced = True
            announce(facts)

    def _pause(self) -> float | None:
        due = [worker.start_at for worker in self.workers if worker.start_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _wait(self, seconds: float | None) -> None:
        """Sleep until a worker reports or ends, or a signal comes."""
        for key, _ in self.selector.select(seconds):
            if isinstance(key.data, Worker):
                self._read(key.data)
            else:
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.recv(4096)

    def _look_after(self, worker: Worker) -> None:
        if worker.process and worker.process.poll() is not None:
            self._bury(worker)
        if worker.start_at is not None and worker.start_at <= time.monotonic():
            self._start(worker)

    def _start(self, worker: Worker) -> None:
        assert self.life is not None
        report, says = os.pipe()
        passed = (self.listener.fileno(), says, self.life)
        seat = Seat(worker.number, len(self.workers), *passed, self.given, self.folder)
        environment = {SEAT: json.dumps(asdict(seat)), METRICS: self.folder, **ONE_THREAD}
        worker.process = subprocess.Popen(
            self.command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            pass_fds=passed,
            # A group of its own: Ctrl-C reaches the supervisor alone, and it stops them in order.
            process_group=0,
        )
        os.close(says)
        worker.report, worker.said, worker.error, worker.start_at = report, b"", None, None
        self.selector.register(report, selectors.EVENT_READ, worker)

    def _read(self, worker: Worker) -> None:
        """Take up what a worker reports: whole lines of JSON, until its end."""
        assert worker.report is not None
        part = os.read(worker.report, 65_536)
        if not part:
            self._close_report(worker)
        *lines, worker.said = (worker.said + part).split(b"\n")
        for said in map(json.loads, lines):
            worker.error = said.get("error", worker.error)
            if "ready" in said:
                self._welcome(worker, said["ready"])

    def _welcome(self, worker: Worker, facts: Facts) -> None:
        worker.facts, worker.ready_at = facts, time.monotonic()
        if self.announced:
            log.info("worker_ready", worker=worker.number, pid=worker.pid)

    def _close_report(self, worker: Worker) -> None:
        if worker.report is not None:
            self.selector.unregister(worker.report)
            os.close(worker.report)
            worker.report = None

    def _bury(self, worker: Worker) -> None:
        """Take leave of a dead worker; raise InputError where it was one of the first."""
        assert worker.process
        while worker.report is not None:
            self._read(worker)
        code, pid, was_ready = worker.process.returncode, worker.pid, worker.facts is not None
        self._forget(worker)
        worker.died(time.monotonic())
        if not self.announced:
            raise InputError(_why(worker, code, was_ready, len(self.workers)))
        log.error(
            "worker_died", worker=worker.number, pid=pid, ended=_ended(code), error=worker.error
        )

    def _forget(self, worker: Worker) -> None:
        """Take back what only the living have: gauges, a place in the queue for connections."""
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid, self.folder)
        Held(Path(self.folder) / HELD, worker.number, len(self.workers))

    # The end.
    def _stop(self) -> None:
        """Let every worker finish; kill those that take too long, or all at Ctrl-C once more."""
        self._signal_all(signal.SIGTERM)
        limit = time.monotonic() + self.stop_seconds
        self.signals = []
        while self._living() and time.monotonic() < limit and signal.SIGINT not in self.signals:
            self._wait(min(0.1, max(0.0, limit - time.monotonic())))
        if left := self._living():
            log.error("workers_killed", workers=[worker.number for worker in left])
            self._signal_all(signal.SIGKILL)
        for worker in self.workers:
            if worker.process:
                worker.process.wait()
            self._close_report(worker)

    def _living(self) -> list[Worker]:
        return [w for w in self.workers if w.process and w.process.poll() is None]

    def _signal_all(self, number: signal.Signals) -> None:
        for worker in self._living():
            assert worker.process
            worker.process.send_signal(number)


def _ended(code: int) -> str:
    """Say how a process ended.

    >>> _ended(1), _ended(-9)
    ('exit code 1', 'SIGKILL')
    """
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _why(worker: Worker, code: int, was_ready: bool, workers: int) -> str:
    """Say why a server could not start."""
    if worker.error:
        return worker.error
    when = "soon after it was ready" if was_ready else "before it was ready"
    memory = "; too little memory? try fewer --workers" if code == -signal.SIGKILL else ""
    return (
        f"worker {worker.number + 1} of {workers} ended {when} ({_ended(code)}); "
        f"what it wrote above says why{memory}"
    )


def module_command(module: str) -> list[str]:
    """Return the command that runs a module with this Python.

    >>> module_command("recsys.serving.worker")[1:]
    ['-m', 'recsys.serving.worker']
    """
    return [sys.executable, "-m", module]
