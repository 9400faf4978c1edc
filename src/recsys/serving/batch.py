"""Recommendations for many people as Parquet parts: answered as served, restartable, shareable.

A part holds the answers of a fixed range of people, and is there whole or not at all. Its bytes
follow from the plan alone, whoever writes it and when: whoever finds one there goes on after it.
"""

from __future__ import annotations

import gc
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import MANIFEST, Workspace, read_manifest, verify, write_manifest
from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.batch_plan import PLAN, Json, agreed, planned
from recsys.serving.batch_settings import BatchSettings, Shard
from recsys.serving.engine import Chosen, Engine, use_one_core
from recsys.serving.messages import RecommendRequest
from recsys.serving.parts import locked, synced, written
from recsys.serving.people import People

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("source", pa.string()),
    ]
)
"""A row a person: ids and scores, best first, and who chose, "model" or "popular"."""
COUNTS = b"recsys"
"""Under this name a part keeps what was counted in it."""
COUNTED = ("users", "popular", "ranker_failed", "unknown_events")
NAMED_MISSING = 3
ALONE = Shard()
Advance = Callable[[int], None]


class Stopped(Exception):
    """Another part failed, so this one is not gone on with."""


class Row(NamedTuple):
    """One person's answer, in a few bytes an item."""

    items: NDArray[np.int32]
    scores: NDArray[np.float32]
    source: str
    failed: bool

    @classmethod
    def of(cls, chosen: Chosen) -> Row:
        """Return an engine's answer as arrays."""
        items, scores = np.array(chosen.items.items, np.int32), chosen.items.scores
        return cls(items, np.array(scores, np.float32), chosen.source, chosen.fallback is not None)


class Batch:
    """Answers to one request, asked of many people, as files in a folder."""

    def __init__(
        self,
        engine: Engine,
        people: People,
        request: RecommendRequest,
        settings: BatchSettings,
        out: Path,
    ) -> None:
        self.engine, self.people, self.settings, self.out = engine, people, settings, out
        plan = planned(engine, people, request, settings)
        self.plan = agreed(out, plan, own_now=request.now is not None)
        self.now = int(self.plan["request"]["now"])
        self.request = msgspec.structs.replace(request, now=self.now)
        self.item_ids = engine.bundle.items["item_id"].combine_chunks().cast(pa.string())
        self.stop = threading.Event()

    @classmethod
    def open(
        cls, bundle: Path, request: RecommendRequest, settings: BatchSettings, workspace: Workspace
    ) -> Batch:
        """Load a bundle, and agree with the folder `settings.out` on what is to be written there.

        Raises InputError where they do not suit each other, or the folder holds something else.
        """
        engine = Engine.load(bundle, ranked=settings.rank is not False, exact=settings.exact)
        people = _people(engine.bundle, settings, workspace)
        out = settings.out or workspace.root / "recommendations" / engine.version
        return cls(engine, people, request, settings, Path(out))

    @property
    def parts(self) -> int:
        """How many parts there are in all."""
        return -(-len(self.people) // self.settings.part_users)

    @property
    def whole(self) -> bool:
        """Whether the manifest is there, and with it every part."""
        return (self.out / MANIFEST).is_file()

    def path(self, part: int) -> Path:
        """Return where a part is, or will be."""
        return self.out / f"part-{part:05d}.parquet"

    def places(self, part: int) -> range:
        """Return the people of a part."""
        size = self.settings.part_users
        return range(part * size, min((part + 1) * size, len(self.people)))

    def missing(self, shard: Shard = ALONE) -> list[int]:
        """Return the parts of a shard that are not there."""
        mine = range(shard.rank, self.parts, shard.world)
        return [part for part in mine if not self.path(part).is_file()]

    def write(self, part: int, advance: Advance = lambda users: None) -> Path:
        """Write one part, whole or not at all; `advance` is told of people as they are answered.

        Raises OSError on a full disk; nothing is left of the part then.
        """
        path, places = self.path(part), self.places(part)
        table, counts = self._answered(places, advance)
        scratch = self.out / f".{path.name}.{secrets.token_hex(4)}"
        written(scratch, [table], SCHEMA.with_metadata({COUNTS: json.dumps(counts)}))
        scratch.replace(path)
        synced(self.out)
        return path

    def finish(self) -> Json:
        """Return the manifest over all parts, made once; raise InputError where one is missing."""
        with locked(self.out / PLAN):
            return self.checked() if self.whole else self._finished()

    def _finished(self) -> Json:
        if missing := self.missing():
            names = ", ".join(self.path(part).name for part in missing[:NAMED_MISSING])
            raise InputError(
                f"{self.out}: {len(missing)} of {self.parts} parts are missing, the first are "
                f"{names}; repeat the command of their shard, then this one"
            )
        counts = [_counts(self.path(part)) for part in range(self.parts)]
        for left in self.out.glob(".part-*"):
            left.unlink(missing_ok=True)
        totals = {name: sum(one[name] for one in counts) for name in COUNTED}
        return write_manifest(self.out, "recommendations", **self.plan, parts=self.parts, **totals)

    def checked(self) -> Json:
        """Return the manifest of a folder that is whole; raise InputError naming a changed file."""
        manifest = read_manifest(self.out, "recommendations")
        verify(self.out, manifest)
        return manifest

    def _answered(self, places: range, advance: Advance) -> tuple[pa.Table, Json]:
        found: dict[int, Row] = {}
        unknown = 0
        for rows in self._chunks(places):
            if self.stop.is_set():
                raise Stopped
            people = [self.people.person(places[row]) for row in rows]
            paths = ((one.user, one.path) for one in people)
            readings = self.engine.reader.readings(
                self.request, paths, self.now, [], self.engine.base
            )
            found |= zip(rows, map(Row.of, self.engine.choose(readings)), strict=True)
            unknown += sum(one.unknown for one in people)
            advance(len(rows))
        answers = [found[row] for row in range(len(places))]
        ids = self.people.ids[places.start : places.stop]
        return self._table(ids, answers), _counted(answers, unknown)

    def _chunks(self, places: range) -> Iterator[list[int]]:
        """Yield rows to encode together: of like lengths, so that little is padded."""
        order = np.argsort(self.people.lengths(places), kind="stable").tolist()
        size = self.settings.batch
        return (order[at : at + size] for at in range(0, len(order), size))

    def _table(self, ids: pa.Array, rows: Sequence[Row]) -> pa.Table:
        offsets = pa.array(np.cumsum([0, *(len(row.items) for row in rows)]), pa.int32())
        items = np.concatenate([row.items for row in rows])
        columns = [
            ids,
            pa.ListArray.from_arrays(offsets, self.item_ids.take(pa.array(items - 1))),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([r.scores for r in rows]))),
            pa.array([row.source for row in rows]),
        ]
        return pa.Table.from_arrays(columns, schema=SCHEMA)


def _people(bundle: Bundle, settings: BatchSettings, workspace: Workspace) -> People:
    if settings.dataset:
        people = People.of_dataset(bundle, workspace.find("dataset", settings.dataset))
    else:
        people = People.of_bundle(bundle)
    if settings.users:
        return people.listed(Path(settings.users), settings.skip_unknown)
    return people


def _counted(rows: Sequence[Row], unknown: int) -> Json:
    popular = sum(row.source == "popular" for row in rows)
    failed = sum(row.failed for row in rows)
    return dict(zip(COUNTED, (len(rows), popular, failed, unknown), strict=True))


def _counts(part: Path) -> Json:
    try:
        with pq.ParquetFile(part) as file:
            counts: Json = json.loads(file.schema_arrow.metadata[COUNTS])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise InputError(f"{part}: not a whole part; delete it and repeat the command") from error
    return counts


def run(batch: Batch, shard: Shard = ALONE, advance: Advance = lambda users: None) -> None:
    """Write the parts of a shard that are missing, some at a time; `advance` as in `Batch.write`.

    Raises what the first part to fail raises; the parts that are there stay.
    """
    gc.freeze()  # to look through all that is loaded again and again took a third of the time
    with ThreadPoolExecutor(batch.settings.threads, initializer=use_one_core) as pool:
        writing = [pool.submit(batch.write, part, advance) for part in batch.missing(shard)]
        try:
            for future in as_completed(writing):
                future.result()
        except BaseException:
            batch.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            gc.unfreeze()
