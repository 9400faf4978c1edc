"""Which bundles serve, and how: a record that all processes share, and this one's loaded engines.

`deployment.json` in the state directory says what is to serve. Whoever changes it loads and tests
the bundle first; every other process follows, and keeps what it has where it cannot.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from weakref import WeakValueDictionary

import msgspec
import structlog
from msgspec import Meta, Struct
from msgspec.structs import replace as changed

from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.engine import Engine, use_one_core
from recsys.serving.messages import HistoryEvent, RecommendRequest, moment
from recsys.serving.parts import synced

log = structlog.get_logger("recsys.serving")
RECORD = "deployment.json"
FORMAT = 1
KEPT = 20
"""So many changes, and so many failures, are remembered."""
TIE = 1e-5
"""Scores this near, relative to their size, are equal: a self-test lets such items swap."""
RETRY = (5.0, 60.0)
"""Seconds until a record that could not be followed is tried again: at first, and at most."""

Mode = Literal["off", "shadow", "canary"]
TrialMode = Literal["shadow", "canary"]
Share = Annotated[float, Meta(ge=0, le=1)]
Identity = tuple[tuple[str, int, int, int], ...]
Result = TypeVar("Result")


class Placed(Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle that was verified: where it is, and what it held at that time."""

    path: str
    version: str
    fingerprint: str

    @classmethod
    def of(cls, bundle: Bundle) -> Placed:
        """Return the name of an opened bundle and of its content."""
        return cls(str(bundle.path), bundle.version, str(bundle.manifest["fingerprint"]))


class Bounds(Struct, frozen=True, forbid_unknown_fields=True):
    """How far a challenger may fall behind before its trial ends by itself.

    Errors are a share of its answers; the slowest hundredth and click-through are compared with
    the champion's, once each arm of a worker has `min_answers`.
    """

    max_error_rate: Share = 0.02
    max_p99_ratio: Annotated[float, Meta(ge=1)] = 1.5
    min_click_ratio: Share = 0.9
    min_answers: Annotated[int, Meta(ge=1)] = 1_000


BOUNDS = Bounds()


class Change(Struct, frozen=True, forbid_unknown_fields=True):
    """One change of the record: which generation it made, what was done, when, by whom and why."""

    generation: int
    what: str
    champion: str
    when: str
    by: str = ""
    why: str = ""


class Deployment(Struct, frozen=True, forbid_unknown_fields=True):
    """What is to serve; the content of `deployment.json`.

    `generation` rises with each change; `trial` is the generation that the present challenger
    began with, 0 without one. `asked` holds what the start setting and each followed alias named
    last, so that only a new answer of theirs changes anything.
    """

    champion: Placed
    format: int = FORMAT
    generation: int = 1
    previous: Placed | None = None
    challenger: Placed | None = None
    mode: Mode = "off"
    share: Share = 0.0
    trial: int = 0
    bounds: Bounds = BOUNDS
    asked: dict[str, Placed] = {}
    history: list[Change] = []

    def deployed(self, bundle: Placed, asked_by: str = "") -> Deployment:
        """Make `bundle` the champion; a trial against the old champion ends."""
        asked = {**self.asked, asked_by: bundle} if asked_by else self.asked
        if bundle == self.champion:
            return changed(self, asked=asked)
        return changed(self.stopped(), champion=bundle, previous=self.champion, asked=asked)

    def rolled_back(self) -> Deployment:
        """Swap the champion with the one before it; a trial ends."""
        if self.previous is None:
            raise InputError(
                f"there is no bundle before {self.champion.version} to return to; deploy one with "
                "`recsys promote BUNDLE`"
            )
        return self.deployed(self.previous)

    def challenged(
        self, bundle: Placed, mode: TrialMode, share: float, bounds: Bounds | None = None
    ) -> Deployment:
        """Put `bundle` on trial; the same one in the same mode goes on with its trial."""
        if bundle == self.champion:
            raise InputError(f"{bundle.version} is the champion; name another bundle to challenge")
        _check_share(share)
        same = bundle == self.challenger and mode == self.mode
        return changed(
            self,
            challenger=bundle,
            mode=mode,
            share=share,
            bounds=bounds or self.bounds,
            trial=self.trial if same else self.generation + 1,
        )

    def stopped(self) -> Deployment:
        """End a trial, where there is one."""
        return changed(self, challenger=None, mode="off", share=0.0, trial=0)

    def promoted(self) -> Deployment:
        """Make the challenger the champion."""
        if self.challenger is None:
            raise InputError(
                f"no bundle challenges {self.champion.version}; deploy one with "
                "`recsys promote BUNDLE`"
            )
        return self.deployed(self.challenger)


class Record:
    """`deployment.json` in a folder: read at any time, changed by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD

    def read(self) -> Deployment:
        """Return the record; raise InputError where there is none or it is not readable."""
        try:
            body = self.path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{self.path}: no bundle is deployed yet; name one to serve") from None
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from error
        return self._decoded(body)

    def begin(self, bundle: Path | None, why: str = "") -> Deployment:
        """Return the record that a server starts with, and write it where it is new.

        `bundle` becomes the champion unless it is what the last start named too: then a deploy or
        rollback since stands. None: as recorded. Raises InputError where the bundle is damaged.
        """
        if bundle is None:
            return self.read()
        placed = Placed.of(Bundle.open(bundle))
        if self.path.exists():
            return self.change(lambda old: _started(old, placed), "start", "start", why)
        with self._locked():
            first = Deployment(champion=placed, asked={"start": placed})
            return self._write(_noted(first, "start", "start", why))

    def change(
        self,
        edit: Callable[[Deployment], Deployment],
        what: str,
        by: str = "",
        why: str = "",
        expected: int | None = None,
    ) -> Deployment:
        """Replace the record by `edit` of it and return it; an edit without effect writes nothing.

        Raises InputError where the edit is not possible, where the generation is not the `expected`
        one, or where the record cannot be written; the old one then stands.
        """
        with self._locked():
            old = self.read()
            if expected is not None and expected != old.generation:
                raise InputError(
                    f"generation {expected} was expected, but it is {old.generation}: "
                    f"{old.history[-1].what if old.history else 'a change'} came between; look at "
                    "GET /admin/bundles and ask again"
                )
            new = edit(old)
            if new == old:
                return old
            return self._write(_noted(changed(new, generation=old.generation + 1), what, by, why))

    def _decoded(self, body: bytes) -> Deployment:
        again = "move it away, and start again with --bundle NAME"
        try:
            met = msgspec.json.decode(body, type=dict[str, Any]).get("format")
            if met != FORMAT:
                raise InputError(
                    f"{self.path}: of format {met}; this recsys reads format {FORMAT}; {again}"
                )
            return msgspec.json.decode(body, type=Deployment)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not a deployment record ({error}); {again}") from error

    def _write(self, deployment: Deployment) -> Deployment:
        scratch = self.path.with_name(f".{RECORD}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(deployment)))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.path)
            synced(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); nothing was changed"
            ) from error
        return deployment

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the record's lock, which processes and threads take alike."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.with_name(f".{RECORD}.lock").open("wb")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            yield


_LOADED: WeakValueDictionary[tuple[str, str, Identity], Engine] = WeakValueDictionary()
"""Engines that somebody still holds, by where they came from and how the files looked."""


def load_verified(path: Path | str, device: str = "cpu") -> Engine:
    """Load the bundle at `path`, checked by its hashes and by its own stored answers.

    An engine of these very files that is in use already is returned again. Raises InputError
    where the bundle is not whole, was changed, is of another schema, or answers differently.
    """
    path = Path(path).resolve()
    try:
        key = (str(path), device, _identity(path))
        if (loaded := _LOADED.get(key)) is not None:
            return loaded
        engine = Engine.load(path, device=device)
        self_test(engine)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        # A manifest or file that is well hashed but makes no sense must not stop a server.
        raise InputError(
            f"{path}: cannot be loaded ({type(error).__name__}: {error}); export it again"
        ) from error
    _LOADED[key] = engine
    return engine


def self_test(engine: Engine) -> None:
    """Ask what the bundle's manifest holds answers to; raise InputError where one differs."""
    for place, entry in enumerate(engine.bundle.manifest.get("self_test", [])):
        met = _differs(engine, entry)
        if met is not None:
            raise InputError(
                f"{engine.bundle.path}: self-test {place} failed: answered {', '.join(met[:5])}, "
                f"expected {', '.join(entry['top'][:5])}; export it again with this version"
            )


def _differs(engine: Engine, entry: dict[str, Any]) -> list[str] | None:
    """Return the items answered where they are not the stored ones, up to ties."""
    request = _self_test_request(entry)
    met = [item.item_id for item in engine.recommend([request])[0].items]
    if met == entry["top"]:
        return None
    wider = engine.recommend([changed(request, k=request.k + 10)])[0].items
    scores = {item.item_id: item.score for item in wider}
    pairs = [(scores.get(a), scores.get(b)) for a, b in zip(met, entry["top"], strict=False)]
    tied = len(met) == len(entry["top"]) and all(_near(a, b) for a, b in pairs)
    return None if tied else met


def _near(left: float | None, right: float | None) -> bool:
    if left is None or right is None:
        return False
    return abs(left - right) <= TIE * max(1.0, abs(left), abs(right))


def _self_test_request(entry: dict[str, Any]) -> RecommendRequest:
    nothing = [None] * len(entry["history"])
    times, values = entry["timestamps"] or nothing, entry.get("values") or nothing
    events = zip(entry["history"], entry["event_types"], times, values, strict=True)
    return RecommendRequest(
        user_id=entry["user_id"],
        history=[
            HistoryEvent(item, kind, moment(time), value) for item, kind, time, value in events
        ],
        k=len(entry["top"]),
        exclude_seen=False,
        now=moment(entry["now"]),
    )


def _identity(path: Path) -> Identity:
    """Return what changes when any file of the directory does: name, inode, time and size."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    return tuple((name, s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats)


@dataclass(frozen=True, slots=True)
class Roster:
    """The engines that one process answers with, never changed: another takes its place whole."""

    champion: Engine
    previous: Engine | None = None
    challenger: Engine | None = None
    mode: Mode = "off"
    share: float = 0.0
    generation: int = 1
    trial: int = 0
    bounds: Bounds = BOUNDS


class Failure(Struct, frozen=True):
    """What went wrong with a change, when last, and how many times in a row."""

    when: str
    message: str
    times: int = 1


class BundlesAnswer(Struct, frozen=True, omit_defaults=True):
    """The record, and which bundles this process answers with (it may lag behind by a load)."""

    record: Deployment
    generation: int
    champion: str
    challenger: str | None = None
    previous: str | None = None
    failures: list[Failure] = []


class Deployer:
    """Keeps `current`, the roster of this process, at what the record says.

    All loading is done by one thread, one thing after another, while the old roster answers. A
    change asked for here is loaded and tested first, then recorded, then swapped in; a change made
    elsewhere is followed within `every` seconds and a load. What fails leaves the roster as it is.
    """

    def __init__(
        self,
        folder: Path,
        *,
        load: Callable[[Path | str], Engine] = load_verified,
        keep_previous: bool = True,
        every: float = 0.2,
    ) -> None:
        self.file, self.load, self.keep_previous = Record(folder), load, keep_previous
        self.every, self.failures = every, list[Failure]()
        self._engines: dict[Placed, Engine] = {}
        self._listeners: list[Callable[[Roster], None]] = []
        self._refused: tuple[Deployment, float, float] | None = None
        # FAISS keeps a pool of threads for each thread that calls it with several cores.
        self._loader = ThreadPoolExecutor(1, "loader", initializer=use_one_core)
        self._stopping = threading.Event()
        try:
            self._loading(self._start)
        except BaseException:
            self._loader.shutdown()
            raise
        self._watcher = threading.Thread(target=self._watch, name="deployment", daemon=True)
        self._watcher.start()

    def on_change(self, tell: Callable[[Roster], None]) -> None:
        """Call `tell` with each roster that takes the place of another, from the loading thread."""
        self._listeners.append(tell)

    def deploy(
        self,
        path: Path | str,
        by: str = "",
        why: str = "",
        *,
        expected: int | None = None,
        asked_by: str = "",
    ) -> Deployment:
        """Make the bundle at `path` the champion everywhere, and return the record.

        `expected` refuses the change where the record is of another generation; `asked_by` names
        the alias that asked. Raises InputError where the bundle is bad; nothing has changed then.
        """

        def work() -> Deployment:
            placed = self._tested(path)
            return self._changed(
                lambda old: old.deployed(placed, asked_by), "deploy", by, why, expected
            )

        return self._loading(work)

    def rollback(self, by: str = "", why: str = "", *, expected: int | None = None) -> Deployment:
        """Return to the champion before this one, which is still loaded."""

        def work() -> Deployment:
            previous = self.file.read().rolled_back().champion
            self._tested(previous.path, previous)
            return self._changed(Deployment.rolled_back, "rollback", by, why, expected)

        return self._loading(work)

    def challenge(
        self,
        path: Path | str,
        mode: TrialMode = "shadow",
        share: float = 0.0,
        by: str = "",
        why: str = "",
        *,
        bounds: Bounds | None = None,
        expected: int | None = None,
    ) -> Deployment:
        """Put the bundle at `path` on trial: compared unseen, or shown to a share of users."""
        _check_share(share)

        def work() -> Deployment:
            placed = self._tested(path)
            what = f"challenge ({mode} {share:g})"
            return self._changed(
                lambda old: old.challenged(placed, mode, share, bounds), what, by, why, expected
            )

        return self._loading(work)

    def stop_challenge(
        self, by: str = "", why: str = "", *, expected: int | None = None
    ) -> Deployment:
        """End the trial; the champion answers everyone."""
        return self._loading(
            lambda: self._changed(Deployment.stopped, "stop challenge", by, why, expected)
        )

    def promote_challenger(
        self, by: str = "", why: str = "", *, expected: int | None = None
    ) -> Deployment:
        """Make the challenger the champion, and keep the old one for a rollback."""

        def work() -> Deployment:
            challenger = self.file.read().promoted().champion
            self._tested(challenger.path, challenger)
            return self._changed(Deployment.promoted, "promote challenger", by, why, expected)

        return self._loading(work)

    def return_to_champion(self, trial: int, why: str) -> None:
        """End the trial of this number for a reason; one ended elsewhere meanwhile stays so.

        Where the record cannot be written, this process returns alone.
        """

        def work() -> None:
            try:
                self._changed(
                    lambda old: old.stopped() if old.trial == trial else old,
                    "return to champion",
                    "trial",
                    why,
                )
            except InputError as error:
                self._failed(error)
                if self.current.trial == trial:
                    self._swap(replace(self.current, challenger=None, mode="off", trial=0))

        self._loading(work)

    def report(self) -> BundlesAnswer:
        """Return what is recorded, what is loaded here, and what went wrong of late."""
        roster = self.current
        return BundlesAnswer(
            record=self.record,
            generation=roster.generation,
            champion=roster.champion.version,
            challenger=roster.challenger.version if roster.challenger else None,
            previous=roster.previous.version if roster.previous else None,
            failures=list(self.failures),
        )

    def close(self) -> None:
        """Stop following; the roster goes on answering."""
        self._stopping.set()
        self._watcher.join()
        self._loader.shutdown()

    def _loading(self, work: Callable[[], Result]) -> Result:
        """Do something on the loading thread, and wait for it."""
        return self._loader.submit(work).result()

    def _tested(self, path: Path | str, wanted: Placed | None = None) -> Placed:
        """Load a bundle for the coming roster; its content must be the `wanted` one's."""
        engine = self.load(path)
        placed = Placed.of(engine.bundle)
        if wanted and placed != wanted:
            raise InputError(
                f"{path}: holds {placed.fingerprint}, but {wanted.fingerprint} was deployed from "
                "there; deploy it again to serve what it holds now"
            )
        self._engines.setdefault(placed, engine)
        return placed

    def _changed(
        self,
        edit: Callable[[Deployment], Deployment],
        what: str,
        by: str,
        why: str,
        expected: int | None = None,
    ) -> Deployment:
        """Write the record, then bring this process to it."""
        try:
            record = self.file.change(edit, what, by, why, expected)
            if record != self.record:
                self._adopt(record)
            return record
        finally:
            self._forget()

    def _start(self) -> None:
        """Load what the record says, or the champion before where the present one is damaged."""
        self.record = self.file.read()
        try:
            self.current = self._roster(self.record)
        except InputError as error:
            if self.record.previous is None:
                raise
            self._failed(error)
            previous = changed(self.record.stopped(), champion=self.record.previous, previous=None)
            self.current = self._roster(previous)
            self._refuse(self.record)
        self._forget()

    def _watch(self) -> None:
        while not self._stopping.wait(self.every):
            self._loading(self._follow)

    def _follow(self) -> None:
        """Adopt the record where it changed; whatever fails, the roster stays and it is noted."""
        record = None
        try:
            record = self.file.read()
            if self._due(record):
                self._adopt(record)
        except Exception as error:
            self._failed(error)
            if record is not None:
                self._refuse(record)
        finally:
            self._forget()

    def _due(self, record: Deployment) -> bool:
        if self._refused and self._refused[0] == record:
            return time.monotonic() >= self._refused[1]
        return record != self.record

    def _refuse(self, record: Deployment) -> None:
        """Try this record again later, each time after a longer wait."""
        again = self._refused is not None and self._refused[0] == record
        wait = min(self._refused[2] * 2, RETRY[1]) if again and self._refused else RETRY[0]
        self._refused = (record, time.monotonic() + wait, wait)

    def _adopt(self, record: Deployment) -> None:
        roster = self._roster(record)
        self.record, self._refused = record, None
        self._swap(roster)

    def _swap(self, roster: Roster) -> None:
        """Answer with `roster` from now on: one assignment, so that none sees half of it."""
        self.current = roster
        arms = {"champion": roster.champion.version, "mode": roster.mode, "share": roster.share}
        log.info("roster", generation=roster.generation, **arms)
        for tell in self._listeners:
            tell(roster)

    def _roster(self, record: Deployment) -> Roster:
        return Roster(
            champion=self._engine(record.champion),
            previous=self._previous(record),
            challenger=self._engine(record.challenger) if record.challenger else None,
            mode=record.mode,
            share=record.share,
            generation=record.generation,
            trial=record.trial,
            bounds=record.bounds,
        )

    def _engine(self, placed: Placed) -> Engine:
        """Return the engine of a bundle; one in use here needs its files no longer."""
        if placed not in self._engines:
            self._tested(placed.path, placed)
        return self._engines[placed]

    def _previous(self, record: Deployment) -> Engine | None:
        """Return the engine to roll back to; without it the champion still answers."""
        if record.previous is None or not self.keep_previous:
            return None
        try:
            return self._engine(record.previous)
        except InputError as error:
            self._failed(error)
            return None

    def _forget(self) -> None:
        """Let go of engines that the roster does not hold."""
        roster = self.current
        held = [id(e) for e in (roster.champion, roster.previous, roster.challenger)]
        self._engines = {p: e for p, e in self._engines.items() if id(e) in held}

    def _failed(self, error: Exception) -> None:
        """Note a failure; the same one again and again is one entry, logged once."""
        expected = isinstance(error, InputError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        last = self.failures[-1] if self.failures else None
        if last and last.message == message:
            self.failures[-1] = Failure(_now(), message, last.times + 1)
            return
        log.error("deployment_failed", reason=message, exc_info=not expected)
        self.failures = [*self.failures[1 - KEPT :], Failure(_now(), message)]


def _started(old: Deployment, named: Placed) -> Deployment:
    """Return what stands at a start that names a bundle: a choice made since its last start."""
    stands = old.asked.get("start") == named and Path(old.champion.path).is_dir()
    return old if stands else old.deployed(named, "start")


def _noted(deployment: Deployment, what: str, by: str, why: str) -> Deployment:
    note = Change(
        deployment.generation, what, deployment.champion.version, _now(), by[:200], why[:1000]
    )
    return changed(deployment, history=[*deployment.history, note][-KEPT:])


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"share={share:g} is out of range; expected 0 to 1")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
