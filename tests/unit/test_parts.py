"""A log of many Parquet files, some of them broken or of another schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from damaged import damage
from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.prepare import prepare
from recsys.data.sources.events import Events
from recsys.data.summary import summary
from recsys.schema import InputError

T = 1_600_000_000_000
DAYS, ROWS = 12, 40


def day(number: int, **changed: Any) -> pa.Table:
    rows = range(number * ROWS, (number + 1) * ROWS)
    columns = {
        "user_id": [f"u{row % 5}" for row in rows],
        "item_id": [f"i{row % 7}" for row in rows],
        "timestamp": [T + row for row in rows],
        "value": [float(row) for row in rows],
    }
    return pa.table({k: v for k, v in (columns | changed).items() if v is not None})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A folder of days, each of two row groups."""
    for number in range(DAYS):
        write(tmp_path / "log" / f"day-{number:02d}.parquet", day(number))
    return tmp_path / "log"


def write(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table, file, row_group_size=ROWS // 2)


def made(log: Path, **source: Any) -> Dataset:
    settings = {"name": "shop", "path": str(log)}
    workspace = Workspace(log.parent / "w")
    return prepare(settings, Events(**source), {"rule": "leave_one_out"}, workspace)


def refusal(log: Path, **source: Any) -> str:
    with pytest.raises(InputError) as caught:
        made(log, **source)
    assert not (log.parent / "w" / "datasets").exists()
    return str(caught.value)


def test_an_unreadable_row_group_is_named(log: Path) -> None:
    damage(log / "day-07.parquet", group=1)
    said = refusal(log)
    assert f"{log}/day-07.parquet: cannot read row group 2 of 2, rows 21 to 40 (" in said
    assert said.endswith("leave out what cannot be read: data.source.on_corrupt=skip")


def test_unreadable_ids_are_named_where_only_numbers_are_checked(log: Path) -> None:
    for number in range(DAYS):
        write(log / f"day-{number:02d}.parquet", day(number, user_id=[7] * ROWS))
    damage(log / "day-03.parquet", group=0, columns=("user_id",))
    assert "day-03.parquet: cannot read row group 1 of 2, rows 1 to 20" in refusal(log)


@pytest.mark.parametrize("kept_bytes", [0, 3, 200])
def test_half_a_file_is_named(log: Path, kept_bytes: int) -> None:
    file = log / "day-07.parquet"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert f"{file}: not a whole Parquet file" in (said := refusal(log))
    assert "data.source.on_corrupt=skip" in said


def test_what_cannot_be_read_is_left_out_and_counted(log: Path) -> None:
    damage(log / "day-07.parquet", group=1)
    damage(log / "day-02.parquet", group=0, columns=("value",))
    damage(log / "day-02.parquet", group=1)
    (log / "day-05.parquet").write_bytes(b"PAR1 half a file")
    dataset = made(log, on_corrupt="skip")
    left = (DAYS - 1) * ROWS - 3 * ROWS // 2
    assert dataset.manifest["num_events"] == left
    assert dataset.manifest["dropped"] == {"unreadable": 60, "duplicates": 0, "rare": 0}
    assert dataset.manifest["source_rows"] == left + 60
    skipped = dataset.manifest["skipped"]
    assert [one.split(":")[0] for one in skipped] == [
        "day-05.parquet",
        "day-02.parquet",
        "day-02.parquet",
        "day-07.parquet",
    ]
    assert "row group 2 of 2, rows 21 to 40" in skipped[-1]
    times = set(dataset.events["times"] - T)
    assert times == set(range(DAYS * ROWS)) - set(range(80, 120)) - set(range(200, 240)) - set(
        range(300, 320)
    )
    cells = [list(column.cells) for column in summary(dataset).columns]
    assert dict(zip(*cells, strict=True))["not read"].startswith("4: day-05.parquet: ")


def test_a_sound_log_is_the_same_with_skip(log: Path) -> None:
    sound, skipping = made(log), made(log, on_corrupt="skip")
    assert "skipped" not in skipping.manifest
    assert skipping.manifest["fingerprint"] == sound.manifest["fingerprint"]
    assert skipping.manifest["dropped"] == sound.manifest["dropped"]


def test_nothing_readable_is_refused(log: Path) -> None:
    for file in log.iterdir():
        damage(file, group=0)
        damage(file, group=1)
    said = refusal(log, on_corrupt="skip")
    assert "log: no row group in it can be read: day-00.parquet: row group 1 of 2" in said
    for file in log.iterdir():
        file.write_bytes(b"PAR1")
    assert "log: no Parquet file in it can be read: day-00" in refusal(log, on_corrupt="skip")


@pytest.mark.parametrize("column", ["timestamp", "value"])
def test_a_missing_column_is_named_with_both_files(log: Path, column: str) -> None:
    write(log / "day-07.parquet", day(7, **{column: None}))
    said = refusal(log)
    assert f"day-07.parquet: no column '{column}', which day-00.parquet has; found user_id" in said
    assert ("data.source.columns.value=null" in said) == (column == "value")
    if column == "value":
        made(log, columns={"value": None})


@pytest.mark.parametrize(
    ("column", "values", "theirs", "ours"),
    [
        ("timestamp", ["2024-01-01"] * ROWS, "string", "int64"),
        ("user_id", list(range(ROWS)), "int64", "string"),
        ("value", [True] * ROWS, "bool", "double"),
    ],
)
def test_a_changed_type_is_named_with_both_files(
    log: Path, column: str, values: list, theirs: str, ours: str
) -> None:
    write(log / "day-07.parquet", day(7, **{column: values}))
    said = refusal(log)
    assert f"day-07.parquet: column '{column}' is {theirs}, and in day-00.parquet it is" in said
    assert f"it is {ours}; expected one kind through all files" in said


def test_widths_and_columns_that_nobody_reads_may_differ(log: Path) -> None:
    sound = made(log)
    narrow = pa.array([None if i % 2 else i for i in range(ROWS)], pa.int32())
    write(log / "day-03.parquet", day(3, value=narrow, shelf=["a"] * ROWS))
    write(log / "day-04.parquet", day(4, value=pa.nulls(ROWS)))
    dataset = made(log)
    assert dataset.manifest["num_events"] == sound.manifest["num_events"]
    assert (
        dataset.manifest["files"]["events/times.npy"] == sound.manifest["files"]["events/times.npy"]
    )


def test_what_has_no_effect_is_refused(log: Path) -> None:
    assert "data.source.on_corrupt=drop: expected refuse or skip" in refusal(log, on_corrupt="drop")
    text = log.parent / "log.csv"
    text.write_text("user_id,item_id,timestamp\na,x,1600000000\n")
    assert "is about Parquet and has no effect on log.csv" in refusal(text, on_corrupt="skip")
