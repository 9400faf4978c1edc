"""The log of a server read back: exactly what was posted, each event once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from recsys.artifacts import Workspace
from recsys.config import config_dir
from recsys.data.dataset import Dataset
from recsys.data.prepare import prepare
from recsys.data.sources import served
from recsys.data.sources.events import COLUMNS
from recsys.data.sources.served import Served
from recsys.schema import InputError
from recsys.serving.log import Shipper
from recsys.serving.state import LoggedEvent, open_state

T = 1_700_000_000_000


def event(number: int, user: str = "u", item: str = "", **other: Any) -> LoggedEvent:
    said = {"event_type": "view", "timestamp": T + number, "received": T, **other}
    return LoggedEvent(f"e{number}", user, item or f"i{number}", **said)


def logged(log_dir: Path, *posts: Iterable[LoggedEvent]) -> Path:
    """Let a server's own parts write each post to a file, none knowing of the one before."""
    (log_dir / "events").mkdir(parents=True)
    for number, post in enumerate(posts):
        alone = log_dir.parent / f"server{number}"
        state = open_state(f"lmdb:{alone / 'state'}", max_events=99, keep_ms=0, sync=False)
        state.append(list(post))
        assert Shipper(alone / "log", state).round()
        state.close()
        for file in (alone / "log" / "events").glob("*.parquet"):
            file.rename(log_dir / "events" / file.name)
    return log_dir


def made(tmp_path: Path, path: Path, **source: Any) -> Dataset:
    return prepare(
        {"name": "shop", "path": str(path)},
        Served(**source),
        {"rule": "leave_one_out"},
        Workspace(tmp_path / "workspace"),
    )


def lines(dataset: Dataset) -> list[tuple]:
    """Return (user, item, ms, type, value) of every event."""
    users = np.repeat(dataset.users["user_id"].to_pylist(), np.diff(dataset.offsets))
    names = ["", *dataset.items["item_id"].to_pylist()]
    e = dataset.events
    return [
        (str(u), names[i], int(t), int(k), None if np.isnan(v) else float(v))
        for u, i, t, k, v in zip(
            users, e["items"], e["times"], e["types"], e["values"], strict=True
        )
    ]


@pytest.mark.parametrize("inner", ["", "events"])
def test_posted_events_come_back_in_time_order_once(tmp_path: Path, inner: str) -> None:
    late = event(1, item="b", event_type="purchase", value=9.5)
    first = [event(3, item="c"), late, event(2, item="a", event_type="cart")]
    # The same posts once more, and another user's event under an id that is taken.
    again = [late, event(3, item="c"), event(3, "v", item="a"), event(4, "v", item="b")]
    dataset = made(tmp_path, logged(tmp_path / "log", first, again) / inner)
    assert sorted(lines(dataset)) == [
        ("u", "a", T + 2, 3, None),
        ("u", "b", T + 1, 4, 9.5),
        ("u", "c", T + 3, 1, None),
        ("v", "a", T + 3, 1, None),
        ("v", "b", T + 4, 1, None),
    ]
    assert [line[1] for line in lines(dataset) if line[0] == "u"] == ["b", "a", "c"]
    assert dataset.manifest["dropped"]["repeated"] == 2
    assert dataset.manifest["source_rows"] == 7


def test_one_moment_keeps_the_order_of_acceptance(tmp_path: Path) -> None:
    posts = [[event(n, item=f"i{n}", timestamp=T)] for n in (5, 1, 9, 3)]
    dataset = made(tmp_path, logged(tmp_path / "log", *posts))
    assert [line[1] for line in lines(dataset)] == ["i5", "i1", "i9", "i3"]


def test_nonsense_is_left_out_and_counted(tmp_path: Path) -> None:
    post = [event(1), event(2, timestamp=5), event(3, timestamp=250_000_000_000_000)]
    post += [event(4, value=1e300), event(5, value=float("inf"))]
    dataset = made(tmp_path, logged(tmp_path / "log", post))
    assert [(line[1], line[4]) for line in lines(dataset)] == [
        ("i1", None),
        ("i4", None),
        ("i5", None),
    ]
    assert dataset.manifest["dropped"]["impossible times"] == 2


def test_an_older_log_goes_before(tmp_path: Path) -> None:
    older = tmp_path / "old.csv"
    seconds = T // 1000
    older.write_text(f"user,item_id,timestamp,event_type\nu,x,{seconds},buy\nw,y,{seconds},view\n")
    items = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["x", "i1"], "colour": ["red", "blue"]}), items)
    dataset = made(
        tmp_path,
        logged(tmp_path / "log", [event(0, "u", "y"), event(1)]),
        also=str(older),
        columns={"user_id": "user"},
        event_types={"buy": "purchase"},
        items=str(items),
    )
    assert lines(dataset) == [
        ("u", "x", T, 4, None),
        ("u", "y", T, 1, None),
        ("u", "i1", T + 1, 1, None),
        ("w", "y", T, 1, None),
    ]
    assert dataset.manifest["item_features"] == {"colour": "categorical"}


def test_an_older_log_without_times_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("user_id,item_id\nu,x\n")
    log_dir = logged(tmp_path / "log", [event(1)])
    with pytest.raises(InputError, match=r"data.source.also needs times"):
        made(tmp_path, log_dir, also=str(tmp_path / "old.csv"), columns={"timestamp": None})


def test_files_that_the_server_merges_away_meanwhile_are_read_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_dir = logged(tmp_path / "log", [event(1)], [event(2), event(3)])
    real = served.parquet

    def merged_away(con: Any, files: list[Path]) -> Any:
        shutil.rmtree(log_dir)
        return real(con, files)

    monkeypatch.setattr(served, "parquet", merged_away)
    assert len(lines(made(tmp_path, log_dir))) == 3


def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(served.os, "link", refuse)
    log_dir = logged(tmp_path / "log", [event(1)], [event(2), event(3)])
    assert len(lines(made(tmp_path, log_dir))) == 3


def test_messages_say_what_to_type_next(tmp_path: Path) -> None:
    (tmp_path / "log" / "events").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.table({"user_id": ["u"]}), tmp_path / "plain" / "x.parquet")
    (tmp_path / "file.csv").write_text("x")
    for path, said in {
        "gone": "no such folder .* Start `recsys serve`, post events to /v1/events, and type "
        "data.path=WORKSPACE/serving/log",
        "log": "no events logged yet. Post some to /v1/events",
        "plain": "no column 'event_id', so not the log of a server; .* type data=events",
        "file.csv": "For your own file type data=events",
    }.items():
        with pytest.raises(InputError, match=said):
            made(tmp_path, tmp_path / path)


def test_the_shipped_config_reads_a_served_log(tmp_path: Path) -> None:
    log_dir = logged(tmp_path / "log", [event(n, f"u{n % 2}", f"i{n % 5}") for n in range(20)])
    data = OmegaConf.load(config_dir() / "data" / "served.yaml")
    data.path = str(log_dir)
    source = instantiate(data.source)
    assert source == Served(columns={name: name for name in COLUMNS})
    dataset = prepare(data, source, {"rule": "leave_one_out"}, Workspace(tmp_path / "workspace"))
    assert len(lines(dataset)) == 20
