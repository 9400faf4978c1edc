"""Criteo's display ads: a label, 13 numbers and 26 categories a row; no user, item or time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from recsys.data.sources import Tables, no_events
from recsys.data.sources.files import existing, inside
from recsys.data.sources.sets import ShownLog, home, shown_logs, there, together

if TYPE_CHECKING:
    import ibis.expr.types as ir

FILES = {"train.csv": "train", "valid.csv": "validation", "test.csv": "test"}
NUMBERS = tuple(f"i{place}" for place in range(1, 14))
CATEGORIES = tuple(f"c{place}" for place in range(1, 27))
COLUMNS = ("label", *NUMBERS, *CATEGORIES)


@dataclass(frozen=True)
class Criteo:
    """The folder of Criteo_x4 (train.csv, valid.csv, test.csv), or the competition's train.txt.

    buckets: numbers become categories: ⌊ln²x⌋ above 2, x up to there, 0 where nothing is. So the
    code of BARS has it (FuxiCTR's `convert_to_bucket`), though its README says ⌊log2 x⌋. train.txt
    is in the order of time and not split.
    """

    buckets: bool = True

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read every row as a request of its own, all of whose columns are context."""
        impressions = together(_logs(con, existing(path)), self._columns)
        return Tables(no_events(), None, None, False, impressions=impressions, labels=("click",))

    def _columns(self, log: ShownLog) -> Mapping[str, ir.Value]:
        numbers = {name.upper(): one for name, one in log.numbers(NUMBERS).items()}
        if self.buckets:
            numbers = {name: bucket(number) for name, number in numbers.items()}
        return {
            "user_id": ibis.null("string"),
            "item_id": ibis.null("string"),
            "timestamp": log.places,
            "click": log.flags(["label"])["label"],
            **numbers,
            **{name.upper(): log.texts(name) for name in CATEGORIES},
        }


def bucket(number: ir.Value) -> ir.Value:
    """Return the name of the bucket that a number is in."""
    filled = number.fill_null(0.0)
    # DuckDB computes both branches, and the logarithm of 0 is an error.
    squared = (ibis.greatest(filled, 1.0).ln() ** 2).floor()
    return ibis.ifelse(filled > 2, squared, filled).cast("int64").cast("string")


def _logs(con: ibis.BaseBackend, found: Path) -> list[ShownLog]:
    raw = found if found.is_file() else None
    if raw is None and there(found, "train.txt") and not there(found, "train.csv"):
        raw = inside(found, ("train.txt",))
    if raw is not None:
        return shown_logs(con, [(raw, "")], COLUMNS, delimiter="\t", has_header=False)
    folder = home(found, tuple(FILES), "criteo_x4")
    files = [(there(folder, name)[0], part) for name, part in FILES.items()]
    return shown_logs(con, files, COLUMNS)
