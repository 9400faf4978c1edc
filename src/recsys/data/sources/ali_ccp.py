"""Ali-CCP: clicks and purchases, in skeletons of samples and features that samples share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from recsys.data.sources import Tables, no_events
from recsys.data.sources.sets import ShownLog, check_count, home, shown_logs, there, together
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis.expr.types as ir

PARTS = ("train", "test")
FILES = tuple(
    f"{kind}_{part}.csv" for part in PARTS for kind in ("sample_skeleton", "common_features")
)
SAMPLE = ("sample_id", "click", "purchase", "common", "count", "features")
COMMON = ("common", "count", "features")
BETWEEN, AFTER_FIELD, AFTER_ID = "\x01", "\x02", "\x03"
"""A feature is field, AFTER_FIELD, id, AFTER_ID, value; BETWEEN stands between features."""
PERSON = {
    "user_id": "101",
    "profile": "121",
    "profile_group": "122",
    "gender": "124",
    "age": "125",
    "spending": "126",
    "spending_level": "127",
    "works": "128",
    "geography": "129",
}
HISTORIES = {
    "categories_seen": "109_14",
    "shops_seen": "110_14",
    "brands_seen": "127_14",
    "intentions_seen": "150_14",
}
ITEM = {"item_id": "205", "category": "206", "shop": "207", "brand": "216"}
CROSSED = {
    "category_crossed": "508",
    "shop_crossed": "509",
    "brand_crossed": "702",
    "intention_crossed": "853",
}
SCENE = {"scene": "301"}


@dataclass(frozen=True)
class AliCcp:
    """The folder with sample_skeleton_{train,test}.csv and common_features_{train,test}.csv.

    The columns are those of AITM (KDD 2021); samples bought but not clicked are left out and
    counted, as there. histories: how many of the categories, shops, brands and intentions of a
    person's 14 days to keep, the weightiest first; 0: none, as there. validation_every: of so many
    training samples one validates (AITM draws a tenth); 0: none.
    """

    histories: int = 0
    validation_every: int = 10

    def __post_init__(self) -> None:
        check_count("histories", self.histories)
        check_count("validation_every", self.validation_every)
        if self.validation_every == 1:
            raise InputError("data.source.validation_every=1 leaves nothing to train on; say 10")

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read every sample as a request of its own, all of whose columns are context."""
        folder = home(path, FILES, "ali_ccp")
        samples = shown_logs(con, _files(folder, "sample_skeleton"), SAMPLE, has_header=False)
        shared = shown_logs(con, _files(folder, "common_features"), COMMON, has_header=False)
        people = con.create_table("ali_ccp_people", together(shared, self._people), temp=True)
        rows = con.create_table("ali_ccp_samples", together(samples, _samples), temp=True)
        _refuse_twins(people, shared)
        _refuse_strangers(people, samples)
        without_click = (rows.click == 0) & (rows.purchase == 1)
        dropped = int(rows.filter(without_click).count().to_pyarrow().as_py())
        joined = rows.filter(~without_click).join(people.drop("row"), ["common", "part"])
        return Tables(
            no_events(),
            None,
            None,
            False,
            {"bought_without_click": dropped},
            joined.drop("common").mutate(timestamp=joined.row, part=self._part(joined)),
            ("click", "purchase"),
        )

    def _part(self, rows: ir.Table) -> ir.Value:
        if not self.validation_every:
            return rows.part
        last = rows.row % self.validation_every == self.validation_every - 1
        return ibis.ifelse((rows.part == "train") & last, "validation", rows.part)

    def _people(self, log: ShownLog) -> Mapping[str, ir.Value]:
        _check_counts(log)
        text = log.table.features
        seen = HISTORIES if self.histories else {}
        return {
            "common": log.ids("common"),
            **{name: _one(text, field) for name, field in PERSON.items()},
            "person": _one(text, PERSON["user_id"]),
            **{name: _weightiest(text, field, self.histories) for name, field in seen.items()},
        }


def _files(folder: Path, kind: str) -> list[tuple[Path, str]]:
    return [(there(folder, f"{kind}_{part}.csv")[0], part) for part in PARTS]


def _samples(log: ShownLog) -> Mapping[str, ir.Value]:
    _check_counts(log)
    text = log.table.features
    fields = ITEM | CROSSED | SCENE
    return {
        **log.flags(["click", "purchase"]),
        "common": log.ids("common"),
        **{name: _one(text, field) for name, field in fields.items()},
    }


def _check_counts(log: ShownLog) -> None:
    """Raise InputError for a row whose features are not as many as it says: it was cut."""
    found = log.lists("features", BETWEEN).length()
    said = log.table["count"].try_cast("int64")
    log.refuse({"count": said.isnull() | (said != found)}, "expected how many features follow")


def _one(text: ir.Value, field: str) -> ir.Value:
    """Return the id in a field, the last where there are several; null where there is none."""
    pattern = f"(?:.*{BETWEEN}|^){field}{AFTER_FIELD}([^{AFTER_ID}]*){AFTER_ID}"
    return text.re_extract(pattern, 1).nullif("")


def _entries(text: ir.Value, field: str) -> ir.Value:
    features = ibis.coalesce(text, "").split(BETWEEN)
    return features.filter(lambda one: one.startswith(f"{field}{AFTER_FIELD}"))


def _id(entry: ir.Value) -> ir.Value:
    return entry.split(AFTER_FIELD)[1].split(AFTER_ID)[0]


def _weightiest(text: ir.Value, field: str, most: int) -> ir.Value:
    """Return the ids in a field, those with the greatest values first."""

    def weighed(entry: ir.Value) -> ir.Value:
        value = entry.split(AFTER_ID)[1].try_cast("float64")
        return ibis.struct({"weight": -value, "id": _id(entry)})

    return _entries(text, field).map(weighed).sort()[:most].map(lambda one: one["id"])


def _refuse_twins(people: ir.Table, shared: list[ShownLog]) -> None:
    """Raise InputError for common features that two rows give, the later of which is named."""
    counted = people.group_by(["common", "part"]).aggregate(last=people.row.max(), n=people.count())
    for log in shared:
        twins = counted.filter((counted.n > 1) & (counted.part == log.part))
        later = log.table.semi_join(twins, log.places == twins["last"])
        again = replace(log, table=later)
        again.refuse({"common": later.common.notnull()}, "which an earlier row has; expected one")


def _refuse_strangers(people: ir.Table, samples: list[ShownLog]) -> None:
    """Raise InputError for a sample whose common features are not in their file."""
    for log in samples:
        known = people.filter(people.part == log.part)
        alone = replace(log, table=log.table.anti_join(known, "common"))
        file = f"common_features_{log.part}.csv"
        alone.refuse({"common": alone.table.common.notnull()}, f"expected a row of it in {file}")
