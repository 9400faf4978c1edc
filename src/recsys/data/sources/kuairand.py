"""KuaiRand (Pure, 1K, 27K): videos shown by Kuaishou's recommender and at random, with feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from recsys.data.sources import Tables
from recsys.data.sources.sets import ShownLog, home, shown_logs, there, together
from recsys.schema import InputError, suggestion

if TYPE_CHECKING:
    import ibis.expr.types as ir

STANDARD = ("log_standard_4_08_to_4_21_*.csv", "log_standard_4_22_to_5_08_*.csv")
RANDOM = "log_random_4_22_to_5_08_*.csv"
USERS = "user_features_*.csv"
VIDEOS = "video_features_basic_*.csv"
LABELS = {
    "click": "is_click",
    "like": "is_like",
    "follow": "is_follow",
    "comment": "is_comment",
    "forward": "is_forward",
    "hate": "is_hate",
    "long_view": "long_view",
}
COLUMNS = ("user_id", "video_id", "time_ms", *LABELS.values(), "play_time_ms", "is_rand", "tab")
USER_WORDS = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{place}" for place in range(18)),
)
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_WORDS = ("author_id", "video_type", "upload_type", "music_id", "music_type")
VIDEO_NUMBERS = ("video_duration", "server_width", "server_height")
VIDEO_COLUMNS = ("video_id", *VIDEO_WORDS, *VIDEO_NUMBERS, "upload_dt", "tag")


@dataclass(frozen=True)
class KuaiRand:
    """The folder of one version as it comes out of its archive, or its folder `data`.

    labels: which feedback to predict; `dwell` is the time played. random: read the log of videos
    shown at random too, from 22 April on. Left out, for they tell of the time after: the file
    video_features_statistic_*.csv (means over the whole month) and visible_status (as it is now).
    """

    labels: Sequence[str] = ("click", "like", "follow", "comment", "forward", "hate", "long_view")
    random: bool = True

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read what was shown as requests of one video, clicks and likes as events."""
        labels = self._chosen()
        names = (*STANDARD, *((RANDOM,) if self.random else ()))
        folder = home(path, (*names, USERS, VIDEOS), "kuairand-pure")
        logs = shown_logs(con, [(f, "") for name in names for f in there(folder, name)], COLUMNS)
        shown = together(logs, _columns)
        kept = [name for name in (*LABELS, "dwell") if name not in labels]
        return Tables(
            _events(shown),
            _videos(_one(con, folder, VIDEOS, VIDEO_COLUMNS)),
            _people(_one(con, folder, USERS, ("user_id", *USER_WORDS, *USER_NUMBERS))),
            True,
            impressions=shown.drop(*kept),
            labels=labels,
        )

    def _chosen(self) -> tuple[str, ...]:
        known = (*LABELS, "dwell")
        for name in self.labels:
            if name not in known:
                raise InputError(
                    f"data.source.labels has {name!r}; expected some of {', '.join(known)}"
                    + suggestion(str(name), known)
                )
        return tuple(self.labels)


def _one(con: ibis.BaseBackend, folder: Path, pattern: str, columns: Sequence[str]) -> ShownLog:
    return shown_logs(con, [(there(folder, pattern)[0], "")], columns)[0]


def _columns(log: ShownLog) -> Mapping[str, ir.Value]:
    flags = log.flags(LABELS.values())
    return {
        "user_id": log.ids("user_id"),
        "item_id": log.ids("video_id"),
        "timestamp": log.moments("time_ms"),
        **{ours: flags[theirs] for ours, theirs in LABELS.items()},
        "dwell": log.numbers(["play_time_ms"], 0)["play_time_ms"] / 1000,
        "tab": log.texts("tab"),
        "is_rand": log.texts("is_rand"),
    }


def _events(shown: ir.Table) -> ir.Table:
    """Return clicks as views, with the seconds played, and likes as favourites."""
    return _of_label(shown, "click", "view", shown.dwell).union(
        _of_label(shown, "like", "favourite", ibis.null("float32"))
    )


def _of_label(shown: ir.Table, label: str, kind: str, value: ir.Value) -> ir.Table:
    named = shown.mutate(event_type=ibis.literal(kind), value=value.cast("float32"))
    return named.filter(named[label] == 1).select(
        "user_id", "item_id", "timestamp", "event_type", "value", "row"
    )


def _videos(log: ShownLog) -> ir.Table:
    """Return the item table; `upload_day` counts from 1970."""
    text = log.texts("upload_dt")
    day = text.try_cast("date")
    log.refuse({"upload_dt": text.notnull() & day.isnull()}, "expected YYYY-MM-DD")
    return log.table.select(
        item_id=log.ids("video_id"),
        **{name: log.texts(name) for name in VIDEO_WORDS},
        **log.numbers(VIDEO_NUMBERS, 0),
        upload_day=day.delta(ibis.date("1970-01-01"), unit="day").cast("float64"),
        tags=log.lists("tag", ","),
    )


def _people(log: ShownLog) -> ir.Table:
    return log.table.select(
        user_id=log.ids("user_id"),
        **{name: log.texts(name) for name in USER_WORDS},
        **log.numbers(USER_NUMBERS),
    )
