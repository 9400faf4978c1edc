"""Who is recommended to, in an order that stays, and what each did: of a bundle or of a dataset.

Shapes: U people, E events, N items. Items are indices 1 to N of the bundle; 0 is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import read_manifest, sha256
from recsys.index.bundle import Bundle, UserRows
from recsys.schema import PAD, InputError
from recsys.serving.candidates import NAMED_UNKNOWN
from recsys.serving.paths import EMPTY, Trajectory, stored

NOBODY = -1
"""The row of a person of whom nothing is stored."""


class Person(NamedTuple):
    """One person: the bundle's row of them plus one, 0 unknown; path; events of unknown items."""

    user: int
    path: Trajectory
    unknown: int


@dataclass(frozen=True)
class People:
    """Some people and where their events lie.

    ids: user ids [U]. rows: int64 [U], their rows in `events`, or NOBODY. items: the bundle's index
    of each item index in `events`, None where they are the same. bundle: who the bundle knows, None
    where a row is the bundle's own. facts: what tells these people from others.
    """

    ids: pa.Array
    rows: NDArray[np.int64]
    events: Mapping[str, NDArray[Any]]
    items: NDArray[np.int64] | None
    bundle: UserRows | None
    has_time: bool
    facts: Mapping[str, Any]

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> People:
        """Return everyone whose events the bundle holds."""
        facts = {"of": "bundle"}
        rows, ids = np.arange(bundle.num_users), bundle.users.ids
        return cls(ids, rows, _plain(bundle.events), None, None, bundle.has_time, facts)

    @classmethod
    def of_dataset(cls, bundle: Bundle, path: Path) -> People:
        """Return everyone of a dataset, what they did in the bundle's items.

        Raises InputError where the bundle knows none of its items, or reads times that it has not.
        """
        # A dataset keeps items, users and events as a bundle does.
        there = Bundle(path, read_manifest(path, "dataset"))
        if bundle.has_time and not there.has_time:
            raise InputError(
                f"dataset {path.name} has no times, and bundle {bundle.version} reads them; "
                "prepare it from a log with timestamps, or name another --dataset"
            )
        items = _translation(there, bundle)
        known = int(np.count_nonzero(items))
        if not known:
            raise InputError(
                f"dataset {path.name}: bundle {bundle.version} knows none of its {there.num_items} "
                "items; name the dataset that the bundle was trained on, or one with the same ids"
            )
        facts = {
            "of": "dataset",
            "dataset": path.name,
            "fingerprint": there.manifest["fingerprint"],
        }
        facts["unknown_items"] = there.num_items - known
        rows, ids, events = np.arange(there.num_users), there.users.ids, _plain(there.events)
        return cls(ids, rows, events, items, bundle.users, bundle.has_time, facts)

    def __len__(self) -> int:
        return len(self.ids)

    def listed(self, file: Path, skip_unknown: bool = False) -> People:
        """Return those named in a file, in its order, once; the unknown too unless skipped.

        Raises InputError where the file names nobody, or nobody who is left.
        """
        ids = _listed(file)
        rows = pc.fill_null(pc.index_in(ids, value_set=self.ids), NOBODY)
        rows_U = np.asarray(rows, np.int64)
        unknown = np.flatnonzero(rows_U == NOBODY)
        named = [str(ids[place]) for place in unknown[:NAMED_UNKNOWN].tolist()]
        if skip_unknown:
            kept = np.flatnonzero(rows_U != NOBODY)
            ids, rows_U = ids.take(pa.array(kept)), rows_U[kept]
        if not len(ids):
            raise InputError(
                f"{file}: none of its {len(unknown)} users is known, such as {', '.join(named)}; "
                "leave out --skip-unknown to answer them with popular items"
            )
        counted = {"count": len(unknown), "first": named}
        said = {"users": sha256(file), "skip_unknown": skip_unknown, "unknown_users": counted}
        places = np.where(rows_U == NOBODY, NOBODY, self.rows[rows_U])
        return replace(self, ids=ids, rows=places, facts={**self.facts, **said})

    def lengths(self, places: range) -> NDArray[np.int64]:
        """Return how many events some people have: int64 [U]."""
        rows, offsets = self.rows[places.start : places.stop], self.events["offsets"]
        return np.where(rows == NOBODY, 0, offsets[rows + 1] - offsets[rows])

    def person(self, place: int) -> Person:
        """Return what is known of one of them."""
        row = int(self.rows[place])
        user = row if self.bundle is None else self.bundle.get(str(self.ids[place]))
        known = 0 if user is None else user + 1
        if row == NOBODY:
            return Person(known, EMPTY, 0)
        path = stored(self.events, row)
        return Person(known, path, 0) if self.items is None else self._translated(known, path)

    def _translated(self, user: int, path: Trajectory) -> Person:
        assert self.items is not None
        whole = path._replace(items=self.items[path.items])
        kept = whole.at(whole.items != PAD)
        if not self.has_time:
            kept = kept._replace(times=np.arange(len(kept.items), dtype=np.int64))
        return Person(user, kept, len(path.items) - len(kept.items))


def _plain(events: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    # Plain arrays over the mapped pages: slicing a numpy.memmap costs five times as much.
    return {name: np.asarray(array) for name, array in events.items()}


def _translation(there: Bundle, here: Bundle) -> NDArray[np.int64]:
    """Return the index here of each item index there: int64 [N + 1], 0 where it is not known."""
    theirs, ours = (_whole(one.items["item_id"]) for one in (there, here))
    places = pc.add(pc.fill_null(pc.index_in(theirs, value_set=ours), -1), 1)
    return np.concatenate([[PAD], np.asarray(places, np.int64)])


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().cast(pa.string())


def _listed(file: Path) -> pa.Array:
    """Return a file's user ids, each once."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if "user_id" not in names:
                raise InputError(f"{file}: no column 'user_id'; found {', '.join(names)}")
            ids = _whole(parquet.read(["user_id"])["user_id"]).drop_null()
    else:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        ids = pa.array([line for line in lines[lines[:1] == ["user_id"] :] if line], pa.string())
    if not len(ids):
        raise InputError(f"{file}: names no user; expected an id a line, or Parquet with user_id")
    return pc.unique(ids)
