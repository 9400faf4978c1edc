"""Prepare by Spark: the same files, byte for byte, as by DuckDB."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from damaged import damage
from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.engines import engine_of
from recsys.data.prepare import PrepareSettings, prepare
from recsys.data.sources import Source
from recsys.data.sources.amazon import Amazon
from recsys.data.sources.events import Events
from recsys.data.sources.movielens import MovieLens
from recsys.data.sources.sequences import Sequences
from recsys.data.synthetic import SyntheticShop
from recsys.schema import InputError

T = 1_600_000_000_000
LEAVE_ONE_OUT = {"rule": "leave_one_out"}
TEMPORAL = {"rule": "temporal", "validation_share": 0.2, "test_share": 0.2}


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    """One Spark session of this machine, which every test finds running."""
    sql = pytest.importorskip("pyspark.sql", reason="no PySpark: pip install 'recsys[spark]'")
    if shutil.which("java") is None:
        pytest.skip("no Java: apt-get install openjdk-17-jre-headless")
    options = {
        "spark.master": "local[1]",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.memory": "1g",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
    }
    session = sql.SparkSession.builder.config(map=options).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def made(
    tmp_path: Path, engine: str, path: Path | None, source: Source, split: Any, **settings: Any
) -> Dataset:
    chosen = {"name": "shop", "path": path and str(path), "engine": engine, **settings}
    return prepare(chosen, source, split, Workspace(tmp_path / engine))


def same(
    tmp_path: Path,
    path: Path | None,
    source: Source,
    split: Any = LEAVE_ONE_OUT,
    **settings: Any,
) -> Dataset:
    """Prepare by both engines, and hold every file and fact of one against the other's."""
    ours = made(tmp_path, "duckdb", path, source, split, **settings)
    theirs = made(tmp_path, "spark", path, source, split, **settings)
    assert theirs.manifest["files"] == ours.manifest["files"]
    assert theirs.path.name == ours.path.name
    for fact in set(ours.manifest) - {"created", "seconds", "prepare"}:
        assert theirs.manifest[fact] == ours.manifest[fact], fact
    assert theirs.manifest["prepare"] == {**ours.manifest["prepare"], "engine": "spark"}
    assert sorted(p.name for p in theirs.path.parent.iterdir()) == ["latest", theirs.path.name]
    return theirs


def test_beauty(session: Any, tmp_path: Path, shared_data: Path) -> None:
    dataset = same(tmp_path, shared_data / "amazon_beauty.txt", Sequences())
    assert (dataset.num_users, dataset.num_items) == (22_363, 12_101)


def test_movielens(session: Any, tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "ml-latest-small"
    dataset = same(tmp_path, folder, MovieLens(min_rating=3), TEMPORAL, k_core=5)
    assert dataset.manifest["dropped"]["low_rating"] == 19_073
    assert dataset.manifest["item_features"]["genres"] == "multi"


def test_the_synthetic_shop_with_impressions(session: Any, tmp_path: Path) -> None:
    shop = SyntheticShop(num_users=120, num_items=60, num_aisles=4, impressions=2_000)
    dataset = same(tmp_path, None, shop, TEMPORAL)
    assert dataset.manifest["impressions"]["rows"] > 1_000


IDS = ["é", "z", "Z", "a b", "Ω", "\U0001f6d2", "10", "9", "%41", "'", "A", "ÿ", " ", "|"]
"""Several bytes, blanks, digits: a locale, or UTF-16, would order them otherwise."""


def busy(rows: int, seed: int = 0) -> pa.Table:
    """Few users, items and moments: ties in time, events twice, values null or NaN-free."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": rng.choice(IDS, rows),
            "item_id": rng.choice(IDS, rows),
            "timestamp": T + 1_000 * rng.integers(0, 40, rows),
            "event_type": rng.choice(["view", "cart", "purchase"], rows),
            "value": pa.array(rng.random(rows), mask=rng.random(rows) < 0.3),
        }
    )


def split_into(folder: Path, table: pa.Table, sizes: list[int]) -> Path:
    """Write a folder of Parquet files with names that URIs write otherwise."""
    folder.mkdir(parents=True)
    for place, size in enumerate(sizes):
        part = table.slice(sum(sizes[:place]), size)
        pq.write_table(part, folder / f"day {place} [é%41].parquet", row_group_size=50)
    return folder


def test_ties_duplicates_nulls_and_ids_of_several_bytes(session: Any, tmp_path: Path) -> None:
    log = split_into(tmp_path / "a log", busy(700), [200, 300, 0, 150, 50])
    before = session.conf.get("spark.sql.session.timeZone")
    session.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
    dataset = same(tmp_path, log, Events(), min_item_events=40)
    assert min(dataset.manifest["dropped"].values()) > 0
    assert np.isnan(dataset.events["values"]).any()
    # A session that was there goes on, with its own settings.
    assert session.conf.get("spark.sql.session.timeZone") == "Asia/Tokyo"
    session.conf.set("spark.sql.session.timeZone", before)


def read(tmp_path: Path, engine: str, path: Path, source: Source) -> list[dict]:
    """Read a source's events by an engine; return them in their order."""
    settings = PrepareSettings("shop", engine=engine)
    scratch = tmp_path / f"scratch-{engine}"
    scratch.mkdir(exist_ok=True)
    with engine_of(settings, scratch) as opened:
        tables = opened.read(source, path, scratch)
        return (
            opened.keep("events", opened.rowed(tables.events))
            .order_by("row")
            .to_pyarrow()
            .to_pylist()
        )


def read_alike(tmp_path: Path, path: Path, source: Source | None = None) -> list[dict]:
    ours, theirs = (read(tmp_path, name, path, source or Events()) for name in ("duckdb", "spark"))
    assert theirs == ours
    return theirs


def test_widths_and_units_may_differ_between_files(session: Any, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    days = {
        "a": (pa.int32(), pa.timestamp("ms"), pa.int64()),
        "b": (pa.int64(), pa.timestamp("ns"), pa.float64()),
        "c": (pa.uint16(), pa.timestamp("us", "Europe/Berlin"), pa.float32()),
    }
    for place, (day, (ids, times, values)) in enumerate(days.items()):
        moments = pa.array([T + place * 10 + i for i in range(4)], pa.timestamp("ms", times.tz))
        columns = {
            "user_id": pa.array([1, 2, 1, 2], ids),
            "item_id": pa.array(["x", "y", "z", "x"]).dictionary_encode(),
            "timestamp": moments.cast(times),
            "value": pa.array([1, 2, 3, None], values),
        }
        pq.write_table(pa.table(columns), tmp_path / "log" / f"{day}.parquet")
    events = read_alike(tmp_path, tmp_path / "log")
    assert [event["timestamp"] - T for event in events] == [
        0,
        1,
        2,
        3,
        10,
        11,
        12,
        13,
        20,
        21,
        22,
        23,
    ]
    assert {event["user_id"] for event in events} == {"1", "2"}


FORMS = {
    "zulu": lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "naive": lambda moment: moment.strftime("%Y-%m-%d %H:%M:%S.5"),
    "offset": lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%S+02:00"),
    "seconds": lambda moment: moment.timestamp() + 0.25,
    "text": lambda moment: str(int(moment.timestamp())),
}


@pytest.mark.parametrize("form", [*FORMS, "order"])
def test_forms_of_time(session: Any, tmp_path: Path, form: str) -> None:
    table = busy(60)
    if form != "order":
        moments = table["timestamp"].to_numpy().astype("datetime64[ms]").tolist()
        times = [FORMS[form](moment.replace(tzinfo=UTC)) for moment in moments]
        table = table.set_column(2, "timestamp", pa.array(times))
    pq.write_table(table, tmp_path / "log.parquet")
    columns = {"timestamp": None} if form == "order" else {}
    read_alike(tmp_path, tmp_path / "log.parquet", Events(columns=columns))


def test_text_is_read_alike(session: Any, tmp_path: Path) -> None:
    lines = [f"u{i % 7},i{i % 5},{4 + i % 2}.0,{1_400_000_000 + i // 3}" for i in range(60)]
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    read_alike(tmp_path, tmp_path / "ratings.csv", Amazon())


def test_the_same_dataset_is_found_whatever_the_engine(tmp_path: Path) -> None:
    pq.write_table(busy(60), tmp_path / "log.parquet")
    settings = {"name": "shop", "path": str(tmp_path / "log.parquet")}
    first = prepare(settings, Events(), LEAVE_ONE_OUT, Workspace(tmp_path / "w"))
    again = prepare(
        {**settings, "engine": "spark"}, Events(), LEAVE_ONE_OUT, Workspace(tmp_path / "w")
    )
    assert again.manifest["created"] == first.manifest["created"]
    assert again.manifest["prepare"]["engine"] == "duckdb"


def test_another_master_than_the_session_is_refused(session: Any, tmp_path: Path) -> None:
    settings = PrepareSettings("shop", engine="spark", master="spark://h:7077")
    expected = (
        r"data.master=spark://h:7077: Spark already runs at local\[1\]; leave data.master out"
    )
    with pytest.raises(InputError, match=expected), engine_of(settings, tmp_path):
        pass


def test_bad_rows_are_named_as_by_duckdb(session: Any, tmp_path: Path) -> None:
    table = busy(60).set_column(1, "item_id", pa.array(["x"] * 41 + [None] + ["y"] * 18))
    log = split_into(tmp_path / "log", table, [30, 30])
    for engine in ("duckdb", "spark"):
        with pytest.raises(InputError, match=r"log: row 42: item_id is empty; every event needs"):
            read(tmp_path, engine, log, Events())


def test_an_unreadable_row_group_is_named_as_by_duckdb(session: Any, tmp_path: Path) -> None:
    log = split_into(tmp_path / "log", busy(300), [100, 100, 100])
    damage(log / "day 1 [é%41].parquet", group=1)
    for engine in ("duckdb", "spark"):
        with pytest.raises(InputError, match=r"day 1 .*: cannot read row group 2 of 2, rows 51 to"):
            read(tmp_path, engine, log, Events())
    skipping = Events(on_corrupt="skip")
    assert len(read_alike(tmp_path, log, skipping)) == 250


@pytest.mark.parametrize("missing", ["pyspark", "java", "old java"])
def test_what_spark_needs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "pyspark":
        monkeypatch.setitem(sys.modules, "pyspark.sql", None)
        expected = r"needs PySpark .*pip install 'recsys\[spark\]'"
    else:
        sql = pytest.importorskip("pyspark.sql", reason="no PySpark")
        monkeypatch.setattr(sql.SparkSession, "getActiveSession", lambda: None)
        (tmp_path / "bin").mkdir()
        if missing == "old java":
            (tmp_path / "bin" / "java").write_text("#!/bin/sh\necho 'version \"11.0.2\"' >&2\n")
            (tmp_path / "bin" / "java").chmod(0o755)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        met = "Java 11 found" if missing == "old java" else "no Java found"
        expected = rf"{met} at .*bin/java; data.engine=spark needs Java 17 or 21: apt-get install"
    settings = PrepareSettings("shop", engine="spark")
    with pytest.raises(InputError, match=expected), engine_of(settings, tmp_path):
        pass


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"engine": "sprak"}, r"data.engine=sprak: expected one of duckdb, spark.*'spark'"),
        ({"master": "local[2]"}, r"data.master=local\[2\] is Spark's and has no effect on duckdb"),
    ],
)
def test_bad_settings_are_refused(settings: dict, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        PrepareSettings("shop", **settings)
