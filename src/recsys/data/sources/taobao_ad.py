"""Taobao's display ads of eight days: BARS's TaobaoAd_x1, or Tianchi data set 56 as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from recsys.data.sources import Tables, no_events
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import existing, inside
from recsys.data.sources.sets import ShownLog, check_count, home, shown_logs, there, together

if TYPE_CHECKING:
    import ibis.expr.types as ir

FILES = {"train.csv": "train", "test.csv": "test"}
PERSON = (
    "cms_segid",
    "cms_group_id",
    "final_gender_code",
    "age_level",
    "pvalue_level",
    "shopping_level",
    "occupation",
    "new_user_class_level",
)
AD = ("cate_id", "campaign_id", "customer", "brand")
SEQUENCES = ("btag_his", "cate_his", "brand_his")
X1 = ("clk", *SEQUENCES, "userid", *PERSON, "adgroup_id", *AD, "price", "pid", "btag")
RAW = ("raw_sample.csv", "ad_feature.csv", "user_profile.csv")
EVENT_TYPES = {"pv": "view", "ipv": "view", "fav": "favourite", "cart": "cart", "buy": "purchase"}


@dataclass(frozen=True)
class TaobaoAd:
    """The folder of TaobaoAd_x1 (train.csv, test.csv), or of raw_sample.csv and its companions.

    sequences: how many values of each history column of TaobaoAd_x1 to keep; 0: leave them out.
    test_from: second from which rows of raw_sample.csv are the test part: the eighth day, Beijing
    time.
    """

    sequences: int = 50
    test_from: int = 1_494_604_800

    def __post_init__(self) -> None:
        check_count("sequences", self.sequences)
        check_count("test_from", self.test_from)

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read what was shown, and from the raw files ads, people and what people did before."""
        found = existing(path)
        if found.is_dir() and there(found, RAW[0]):
            return self._raw(con, home(found, RAW, "taobao_ad"))
        folder = home(found, tuple(FILES), "taobao_ad_x1")
        files = [(inside(folder, (name,)), part) for name, part in FILES.items()]
        # The rows have no time: their place stands for it, and all columns are the row's own.
        impressions = together(shown_logs(con, files, X1), self._x1)
        return Tables(no_events(), None, None, False, impressions=impressions, labels=("click",))

    def _x1(self, log: ShownLog) -> Mapping[str, ir.Value]:
        kept = SEQUENCES if self.sequences else ()
        return {
            "user_id": log.ids("userid"),
            "item_id": log.ids("adgroup_id"),
            "timestamp": log.places,
            "click": log.flags(["clk"])["clk"],
            **{name: log.lists(name, "^")[: self.sequences] for name in kept},
            **{name: log.texts(name) for name in ("userid", *PERSON, *AD)},
            **log.numbers(["price"]),
            **{name: log.texts(name) for name in ("pid", "btag")},
        }

    def _raw(self, con: ibis.BaseBackend, folder: Path) -> Tables:
        shown = _one(con, folder, RAW[0], ("user", "time_stamp", "adgroup_id", "pid", "clk"))
        ads = _one(con, folder, RAW[1], ("adgroup_id", *AD, "price"))
        people = _one(con, folder, RAW[2], ("userid", *PERSON))
        events, pairs = _behaviours(con, folder)
        items = ads.table.select(
            item_id=ads.ids("adgroup_id"),
            **{name: _given(ads, name) for name in AD},
            **ads.numbers(["price"], 0),
        )
        users = people.table.select(
            user_id=people.ids("userid"), **{name: people.texts(name) for name in PERSON}
        )
        impressions = together([shown], self._shown)
        return Tables(
            events,
            items if pairs is None else items.union(pairs),
            users,
            True,
            impressions=impressions,
            labels=("click",),
        )

    def _shown(self, log: ShownLog) -> Mapping[str, ir.Value]:
        second = log.moments("time_stamp")
        return {
            "user_id": log.ids("user"),
            "item_id": log.ids("adgroup_id"),
            "timestamp": second * 1000,
            "click": log.flags(["clk"])["clk"],
            "pid": log.texts("pid"),
            "part": ibis.ifelse(second < self.test_from, "train", "test"),
        }


def _one(con: ibis.BaseBackend, folder: Path, name: str, columns: tuple[str, ...]) -> ShownLog:
    return shown_logs(con, [(inside(folder, (name,)), "")], columns)[0]


def _given(log: ShownLog, column: str) -> ir.Value:
    """Return text, null where the file says NULL, as it does for ads without a brand."""
    return log.texts(column).nullif("NULL")


def _behaviours(con: ibis.BaseBackend, folder: Path) -> tuple[ir.Table, ir.Table | None]:
    """Return behaviours as events, and the items they are of.

    The log tells category and brand, not the item: a pair of those stands for one.
    """
    if not there(folder, "behavior_log.csv"):
        return no_events(), None
    log = _one(con, folder, "behavior_log.csv", ("user", "time_stamp", "btag", "cate", "brand"))
    named = log.table.mutate(item_id=_pair(log.table.cate, log.table.brand))
    names = {"user_id": "user", "timestamp": "time_stamp", "event_type": "btag"}
    table = named.select("item_id", "row", **{ours: named[said] for ours, said in names.items()})
    pairs = named.group_by("item_id").aggregate(
        cate_id=named.cate.min(),
        campaign_id=ibis.null("string"),
        customer=ibis.null("string"),
        brand=named.brand.min(),
        price=ibis.null("float64"),
    )
    return Log(table, log.place, names, EVENT_TYPES).events(), pairs


def _pair(category: ir.Value, brand: ir.Value) -> ir.Value:
    return ibis.literal("cate ") + category + " brand " + brand
