"""Sources: every format from a few lines of it, and every bad file with its message."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.artifacts import Workspace
from recsys.data.dataset import Dataset
from recsys.data.prepare import prepare
from recsys.data.sources.amazon import Amazon
from recsys.data.sources.events import Events
from recsys.data.sources.movielens import MovieLens
from recsys.data.sources.otto import Otto
from recsys.data.sources.retailrocket import RetailRocket
from recsys.data.sources.sequences import Sequences
from recsys.data.sources.taobao import Taobao
from recsys.schema import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
T = 1_600_000_000
HEAD = "user_id,item_id,timestamp"


def made(tmp_path: Path, path: Path, source: Any, **settings: Any) -> Dataset:
    return prepare(
        {"name": "shop", "path": str(path), **settings},
        source,
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


def write(path: Path, *text: str) -> Path:
    body = "\n".join(text) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(body.encode()))
    else:
        path.write_text(body, encoding="utf-8")
    return path


def refused(tmp_path: Path, path: Path, source: Any = None) -> str:
    """Return the message with which a file is refused; nothing may be left in the workspace."""
    with pytest.raises(InputError) as caught:
        made(tmp_path, path, source or Events())
    assert list((tmp_path / "workspace").rglob("*")) == []
    return str(caught.value)


GOOD = [f"a,x,{T}", f"a,y,{T + 1}", f"a,z,{T + 2}"]


def test_missing_file(tmp_path: Path) -> None:
    message = refused(tmp_path, tmp_path / "gone.csv")
    assert "gone.csv: no such file or folder" in message
    assert "data.path" in message


def test_no_path_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path is not set; type data.path="):
        prepare({"name": "a"}, Events(), {"rule": "leave_one_out"}, Workspace(tmp_path / "w"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("log.csv", "", "the file is empty (0 bytes)"),
        ("log.csv", HEAD + "\n", "log.csv: no events in it"),
        ("log.parquet", "not parquet", "not a whole Parquet file"),
        ("log.csv.gz", "not gzip", "cannot be read"),
        ("log.xlsx", "x", "cannot tell the format from its name"),
        (
            "events.csv",
            f"user_id,item_id,time\na,b,{T}\n",
            "events.csv: no column 'timestamp'; found user_id, item_id, time. "
            "Map it with data.source.columns.timestamp=time",
        ),
        ("log.csv", f"user_id,item,timestamp\na,b,{T}\n", "data.source.columns.item_id=item"),
        ("log.csv", f"user_id,p,timestamp\na,b,{T}\n", "columns.item_id=YOUR_COLUMN"),
        ("log.csv", "user_id;item_id;timestamp\na;b;1\n", 'data.source.delimiter=";"'),
        ("log.csv", "user_id,user_id,timestamp\n", "column 'user_id' is there twice"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b\n", "Expected Number of Columns: 3 Found: 2"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,yesterday\n", "row 2: timestamp is 'yesterday'"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,\n", "row 2: timestamp is empty"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,nan\n", "row 2: timestamp is 'nan'"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,inf\n", "row 2: timestamp is 'inf'"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,-5\n", "row 2: timestamp is '-5'; expected seconds"),
        ("log.csv", f"{HEAD}\na,b,{T}\na,b,{T}000\na,b,{T}\n", f"row 2: timestamp is '{T}000'"),
        ("log.csv", f"{HEAD}\na,b,2024-02-30\n", "row 1: timestamp is '2024-02-30'"),
        ("log.csv", f"{HEAD}\na,b,{T}\n,b,{T}\n", "row 2: user_id is empty"),
        ("log.csv", f"{HEAD}\na,,{T}\n", "row 1: item_id is empty"),
        (
            "log.csv",
            f"{HEAD},event_type\na,b,{T},view\na,b,{T},pageview\n",
            "row 2: event_type is 'pageview'; known are view, favourite, cart, purchase; "
            "did you mean 'view'?. Map it with +data.source.event_types.pageview=view",
        ),
        ("log.csv", f"{HEAD},event_type\na,b,{T},\n", "row 1: event_type is empty"),
        ("log.csv", f"{HEAD},value\na,b,{T},1\na,b,{T},five\n", "row 2: value is 'five'"),
        ("log.csv", f"{HEAD},value\na,b,{T},nan\n", "row 1: value is 'nan'; expected a finite"),
        ("log.csv", f"{HEAD},value\na,b,{T},-inf\n", "row 1: value is '-inf'"),
        ("log.csv", f"{HEAD},value\na,b,{T},1e300\n", "row 1: value is '1e300'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    assert expected in refused(tmp_path, tmp_path / name)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    body = HEAD + "\n" + f"a,b,{T}\n" * 5000 + f"M\xfcller,b,{T}\n"
    (tmp_path / "log.csv").write_bytes(body.encode("latin-1"))
    assert "Line: 5002" in refused(tmp_path, tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user_id", ["a", None, "c"], "row 2: user_id is empty"),
        ("user_id", ["a", "b", ""], "row 3: user_id is empty"),
        ("user_id", [1.0, 2.0, None], "'user_id' is float64; ids are text or whole numbers"),
        ("timestamp", [T, None, T], "row 2: timestamp is empty"),
        ("timestamp", [float(T), np.nan, T], "row 2: timestamp is nan"),
        ("timestamp", [[1], [2], [3]], "'timestamp' is array<int64>"),
        ("value", [1.0, np.inf, 2.0], "row 2: value is inf"),
    ],
)
def test_bad_parquet_is_refused(tmp_path: Path, column: str, values: list, expected: str) -> None:
    good = {"user_id": list("aaa"), "item_id": list("xyz"), "timestamp": [T, T, T]}
    pq.write_table(pa.table(good | {column: values}), tmp_path / "log.parquet")
    assert expected in refused(tmp_path, tmp_path / "log.parquet")


def test_bad_mapping_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", HEAD, *GOOD)
    assert "did you mean 'timestamp'" in refused(tmp_path, path, Events({"timestmp": "t"}))
    assert "no column 'kind'" in refused(tmp_path, path, Events({"event_type": "kind"}))
    typed = write(tmp_path / "t.csv", HEAD + ",event_type", *(f"{row},x" for row in GOOD))
    assert "unknown event type 'veiw'" in refused(tmp_path, typed, Events({}, {"x": "veiw"}))


MOMENT = 1_714_500_123_456


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1714500123", MOMENT - 456),
        ("1714500123.456", MOMENT),
        ("1714500123456", MOMENT),
        ("1714500123456789", MOMENT),
        ("1714500123456789123", MOMENT),
        ("2024-04-30T18:02:03.456Z", MOMENT),
        ("2024-04-30T20:02:03.456+02:00", MOMENT),
        ("2024-04-30 18:02:03.456", MOMENT),
        ("2024-04-30", 1_714_435_200_000),
    ],
)
def test_units_of_time_in_text_are_recognised(tmp_path: Path, text: str, milliseconds: int) -> None:
    path = write(tmp_path / "log.csv", HEAD, *(f"a,{item},{text}" for item in "xyz"))
    assert {line[2] for line in lines(made(tmp_path, path, Events()))} == {milliseconds}


@pytest.mark.parametrize(
    "column",
    [
        pa.array([MOMENT // 1000] * 3),
        pa.array([MOMENT / 1000] * 3),
        pa.array([MOMENT] * 3),
        pa.array([MOMENT] * 3, pa.timestamp("ms")),
        pa.array([MOMENT * 1000] * 3, pa.timestamp("us", tz="Asia/Shanghai")),
        pa.array([MOMENT * 1_000_000] * 3, pa.timestamp("ns")),
    ],
)
def test_units_of_time_in_parquet_are_recognised(tmp_path: Path, column: pa.Array) -> None:
    table = {"user_id": list("aaa"), "item_id": [1, 2, 3], "timestamp": column}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    dataset = made(tmp_path, tmp_path / "log.parquet", Events())
    assert {line[2] // 1000 for line in lines(dataset)} == {MOMENT // 1000}
    assert [line[1] for line in lines(dataset)] == ["1", "2", "3"]


def test_own_names_types_and_delimiter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.tsv",
        "who\twhat\twhen\thow",
        f"a\tx\t{T}\tbuy",
        f"a\ty\t{T}\tpv",
        f"a\tz\t{T}\tview",
    )
    columns = {"user_id": "who", "item_id": "what", "timestamp": "when", "event_type": "how"}
    dataset = made(
        tmp_path, path, Events(columns, {"buy": "purchase", "pv": "view"}, delimiter="\t")
    )
    assert [(line[1], line[3]) for line in lines(dataset)] == [("x", 4), ("y", 1), ("z", 1)]


def test_rows_give_the_order_where_there_is_no_time(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id,item_id", "b,x", "a,x", "b,z", "a,y", "b,y")
    dataset = made(tmp_path, path, Events({"timestamp": None}))
    assert not dataset.has_time
    assert [line[:3] for line in lines(dataset)] == [
        ("b", "x", 0),
        ("b", "z", 1),
        ("b", "y", 2),
        ("a", "x", 0),
        ("a", "y", 1),
    ]


def test_a_folder_of_parquet_is_one_log_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for part, items in enumerate(("xy", "z", "wv")):
        table = {
            "user_id": ["a"] * len(items),
            "item_id": list(items),
            "timestamp": [T] * len(items),
        }
        pq.write_table(pa.table(table), tmp_path / "log" / f"part-{part}.parquet")
    dataset = made(tmp_path, tmp_path / "log", Events())
    assert [line[1] for line in lines(dataset)] == ["x", "y", "z", "w", "v"]
    (tmp_path / "empty").mkdir()
    assert "no *.parquet in this folder" in refused_again(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("written", ["log", "./sub/../log", "linked"])
def test_a_folder_is_read_alike_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "log").mkdir()
    (tmp_path / "linked").symlink_to("log")
    for part, items in ((1, ["x1", "x2", "x3"]), (2, ["x1", "x2", "x4"])):
        times = [T, T + 1, T + 2 + part]
        table = {"user_id": ["a"] * 3, "item_id": items, "timestamp": times}
        pq.write_table(pa.table(table), tmp_path / "log" / f"{part}.parquet")
    monkeypatch.chdir(tmp_path)
    dataset = made(tmp_path, Path(written), Events())
    assert [line[1] for line in lines(dataset)] == ["x1", "x2", "x3", "x4"]
    assert dataset.manifest["dropped"]["duplicates"] == 2


@pytest.mark.parametrize("name", ["log[ab].csv", "log*.csv", "log?.csv"])
def test_a_name_is_not_a_pattern(tmp_path: Path, name: str) -> None:
    for other in ("loga.csv", "logs.csv"):
        write(tmp_path / other, HEAD, *(f"wrong,{item},{T}" for item in "xyz"))
    path = write(tmp_path / name, HEAD, *(f"right,{item},{T}" for item in "xyz"))
    assert {line[0] for line in lines(made(tmp_path, path, Events()))} == {"right"}
    items = write(tmp_path / "items[ab].csv", "item_id,color", "x,red", "y,blue", "z,red")
    write(tmp_path / "itemsa.csv", "item_id,color", "x,green", "y,green")
    source = Events(items=str(items))
    dataset = made(tmp_path / "featured", path, source)
    assert dataset.items["color"].to_pylist() == ["red", "blue", "red"]


def test_folder_names_are_no_columns(tmp_path: Path) -> None:
    """A column of the file counts, whatever the folder says; one that the file lacks is refused."""
    table = {"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": [T, T + 1, T + 2]}
    own = tmp_path / "own" / "event_type=purchase"
    own.mkdir(parents=True)
    pq.write_table(pa.table({**table, "event_type": ["view", "cart", "view"]}), own / "0.parquet")
    assert [line[3] for line in lines(made(tmp_path, tmp_path / "own", Events()))] == [1, 3, 1]
    lost = tmp_path / "lost" / "event_type=purchase"
    lost.mkdir(parents=True)
    pq.write_table(pa.table(table), lost / "0.parquet")
    said = refused_again(tmp_path, tmp_path / "lost")
    assert "event_type is in the folder's name and not in the file" in said


def test_nanoseconds_with_a_zone_are_moments(tmp_path: Path) -> None:
    times = pa.array([(T + second) * 10**9 for second in range(3)], pa.timestamp("ns", "UTC"))
    table = {"user_id": ["a"] * 3, "item_id": ["x", "y", "z"], "timestamp": times}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    dataset = made(tmp_path, tmp_path / "log.parquet", Events())
    assert [line[2] for line in lines(dataset)] == [T * 1000, T * 1000 + 1000, T * 1000 + 2000]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_an_item_table_is_separated_as_it_is(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path / "log.csv", HEAD, *(f"a,{item},{T}" for item in "xyz"))
    rows = [("item_id", "price"), *((f"i{n}", "1") for n in range(30_000)), ("x", "free")]
    items = write(tmp_path / "items.csv", *(separator.join(row) for row in rows))
    dataset = made(tmp_path, path, Events(items=str(items)))
    assert dataset.items["price"].to_pylist() == ["free", None, None]


def test_ids_with_a_point_are_refused_in_an_item_table(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", HEAD, *(f"a,{item},{T}" for item in "789"))
    pq.write_table(pa.table({"item_id": [7.0, 8.0], "c": ["a", "b"]}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="column 'item_id' holds numbers with a point"):
        made(tmp_path, path, Events(items=str(tmp_path / "items.parquet")))


def test_a_tab_can_be_typed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.tsv", "user_id\titem_id\ttimestamp", *(f"a\t{item}\t{T}" for item in "xyz")
    )
    said = refused_again(tmp_path, path)
    assert """Type 'data.source.delimiter="\\t"'""" in said
    assert len(lines(made(tmp_path, path, Events(delimiter="\\t")))) == 3
    with pytest.raises(InputError, match="delimiter=None: expected one character"):
        Events(delimiter=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value"), [("deduplicate", "no"), ("min_user_events", None), ("threads", None)]
)
def test_settings_of_another_kind_are_refused(tmp_path: Path, setting: str, value: Any) -> None:
    path = write(tmp_path / "log.csv", HEAD, *(f"a,{item},{T}" for item in "xyz"))
    with pytest.raises(InputError, match=f"data.{setting}={value}: expected"):
        made(tmp_path, path, Events(), **{setting: value})


def refused_again(tmp_path: Path, path: Path) -> str:
    return refused(tmp_path / "again", path)


@pytest.mark.parametrize("name", ["s.txt", "s.txt.gz"])
def test_sequences_with_users(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "u1 a b a", "", "u2  c\td 书 ")
    dataset = made(tmp_path, path, Sequences())
    assert [line[:3] for line in lines(dataset)] == [
        ("u1", "a", 0),
        ("u1", "b", 1),
        ("u1", "a", 2),
        ("u2", "c", 0),
        ("u2", "d", 1),
        ("u2", "书", 2),
    ]
    assert dataset.manifest["has_time"] is False


def test_sequences_of_items_only(tmp_path: Path) -> None:
    dataset = made(tmp_path, write(tmp_path / "s.txt", "a b c", "a c"), Sequences(has_users=False))
    assert [line[:2] for line in lines(dataset)] == [
        ("1", "a"),
        ("1", "b"),
        ("1", "c"),
        ("2", "a"),
        ("2", "c"),
    ]


def test_bad_sequences(tmp_path: Path) -> None:
    twice = write(tmp_path / "a.txt", "u a b", "v a", "u c")
    assert "line 3: user 'u' already has line 1" in refused(tmp_path, twice, Sequences())
    alone = write(tmp_path / "b.txt", "u a b", "v")
    message = refused(tmp_path, alone, Sequences())
    assert "line 2: user 'v' has no items" in message
    assert "has_users=false" in message
    assert "no events in it" in refused(tmp_path, write(tmp_path / "c.txt", "", " "), Sequences())
    (tmp_path / "d.txt").write_bytes(b"u \xff\xfe a\n")
    assert "cannot be read as UTF-8" in refused(tmp_path, tmp_path / "d.txt", Sequences())


def test_movielens_with_headers(tmp_path: Path) -> None:
    write(
        tmp_path / "ratings.csv",
        "userId,movieId,rating,timestamp",
        f"7,1,4.5,{T}",
        f"7,3,3.0,{T + 1}",
        f"7,2,5.0,{T + 2}",
    )
    write(
        tmp_path / "movies.csv",
        "movieId,title,genres",
        '1,"Tale, A (1995)",Drama|War',
        "2,No Year,(no genres listed)",
        "3,Z (2001),Comedy",
    )
    dataset = made(tmp_path, tmp_path, MovieLens())
    assert lines(dataset)[0] == ("7", "1", T * 1000, 1, 4.5)
    movies = {row["item_id"]: row for row in dataset.items.to_pylist()}
    assert movies["1"]["title"] == "Tale, A (1995)"
    assert movies["1"]["year"] == 1995
    assert movies["1"]["genres"] == ["Drama", "War"]
    assert movies["2"]["genres"] == []
    kept = made(tmp_path, tmp_path, MovieLens(min_rating=3.0), min_user_events=2)
    assert kept.manifest["dropped"]["low_rating"] == 0


def test_movielens_1m(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", f"1::10::5::{T}", f"1::20::4::{T + 1}", f"1::30::3::{T + 2}")
    (tmp_path / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n20::B (1990)::War\n30::C::War\n".encode(
            "latin-1"
        )
    )
    write(tmp_path / "users.dat", "1::F::25::10::48067")
    dataset = made(tmp_path, tmp_path, MovieLens())
    assert dataset.items["title"].to_pylist()[0] == "Misérables, Les (1995)"
    assert dataset.users.to_pylist()[0]["occupation"] == "10"
    assert dataset.manifest["user_features"]["age"] == "numeric"


def test_movielens_100k(tmp_path: Path) -> None:
    write(tmp_path / "u.data", f"1\t1\t5\t{T}", f"1\t2\t4\t{T + 1}", f"1\t3\t3\t{T + 2}")
    flags = "|".join("1" if i in (1, 5) else "0" for i in range(19))
    write(tmp_path / "u.item", *(f"{i}|M{i} (1995)|01-Jan-1995||url|{flags}" for i in (1, 2, 3)))
    write(tmp_path / "u.user", "1|24|M|technician|85711")
    dataset = made(tmp_path, tmp_path, MovieLens())
    assert dataset.items["genres"].to_pylist()[0] == ["Action", "Comedy"]
    assert dataset.users["age"].to_pylist() == [24]


def test_movielens_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no ratings.csv or ratings.dat or u.data" in refused(
        tmp_path, tmp_path / "empty", MovieLens()
    )
    file = write(tmp_path / "ratings.csv", "x")
    assert f"set data.path={tmp_path}" in refused(tmp_path, file, MovieLens())


AMAZON = {
    "2014.csv": [f"A2SUAM1J3GNN3B,B00000000{i},5.0,{T + i}" for i in range(3)],
    "2018.csv": [f"B00000000{i},A2SUAM1J3GNN3B,5.0,{T + i}" for i in range(3)],
    "2023.csv": [
        "user_id,parent_asin,rating,timestamp",
        *(f"A2SUAM1J3GNN3B,B00000000{i},5.0,{T + i}000" for i in range(3)),
    ],
    "2018.json.gz": [
        json.dumps(
            {
                "overall": 5.0,
                "reviewerID": "A2SUAM1J3GNN3B",
                "asin": f"B00000000{i}",
                "unixReviewTime": T + i,
                "reviewText": 'fine,\n"good"',
                "style": {"Size:": "S"},
            }
        )
        for i in range(3)
    ],
    "2023.jsonl": [
        json.dumps(
            {
                "rating": 5.0,
                "user_id": "A2SUAM1J3GNN3B",
                "asin": "variant",
                "parent_asin": f"B00000000{i}",
                "timestamp": (T + i) * 1000,
            }
        )
        for i in range(3)
    ],
}


@pytest.mark.parametrize("name", AMAZON)
def test_amazon_reviews(tmp_path: Path, name: str) -> None:
    dataset = made(tmp_path, write(tmp_path / name, *AMAZON[name]), Amazon())
    assert lines(dataset) == [
        ("A2SUAM1J3GNN3B", f"B00000000{i}", (T + i) * 1000, 1, 5.0) for i in range(3)
    ]


def test_amazon_metadata(tmp_path: Path) -> None:
    old = {
        "asin": "B000000000",
        "title": "A",
        "brand": "Acme",
        "price": "$1,299.50",
        "main_cat": "Beauty",
        "category": ["Beauty", "Hair"],
    }
    new = {
        "parent_asin": "B000000001",
        "title": "B",
        "store": "Shop",
        "price": 9.5,
        "main_category": "All Beauty",
        "categories": [],
    }
    meta = write(tmp_path / "meta.jsonl", *map(json.dumps, (old, new, new)))
    path = write(tmp_path / "2023.jsonl", *AMAZON["2023.jsonl"])
    dataset = made(tmp_path, path, Amazon(metadata=str(meta)))
    rows = dataset.items.to_pylist()
    assert [row["brand"] for row in rows] == ["Acme", "Shop", None]
    assert [row["price"] for row in rows] == [1299.5, 9.5, None]
    assert rows[0]["categories"] == ["Beauty", "Hair"]


def test_bad_amazon(tmp_path: Path) -> None:
    odd = write(tmp_path / "a.json", '{"who": 1}')
    assert "expected keys user_id, parent_asin" in refused(tmp_path, odd, Amazon())
    python = write(tmp_path / "b.json", "{'asin': 'x'}")
    assert "line 1 is not JSON" in refused(tmp_path, python, Amazon())
    cut = write(tmp_path / "c.jsonl", AMAZON["2023.jsonl"][0], AMAZON["2023.jsonl"][1][:30])
    assert "Malformed JSON" in refused(tmp_path, cut, Amazon())


def test_taobao_drops_and_counts_times_outside_its_days(tmp_path: Path) -> None:
    inside = 1_511_600_000
    path = write(
        tmp_path / "UserBehavior.csv",
        f"1,10,7,pv,{inside}",
        f"1,11,7,fav,{inside + 1}",
        f"1,12,8,cart,{inside + 2}",
        f"1,10,7,buy,{inside + 3}",
        "1,10,7,pv,-1",
        "2,12,8,pv,2037587200",
    )
    dataset = made(tmp_path, path.parent, Taobao())
    assert [line[3] for line in lines(dataset)] == [1, 2, 3, 4]
    assert dataset.manifest["dropped"]["outside_its_days"] == 2
    assert dataset.manifest["source_rows"] == 6
    assert dataset.items.to_pylist()[0]["category"] in ("7", "8")


def test_retailrocket(tmp_path: Path) -> None:
    write(
        tmp_path / "events.csv",
        "timestamp,visitorid,event,itemid,transactionid",
        f"{T}002,5,transaction,32,4000",
        f"{T}000,5,view,31,",
        f"{T}001,5,addtocart,32,",
    )
    write(
        tmp_path / "item_properties_part1.csv",
        "timestamp,itemid,property,value",
        f"{T}000,31,categoryid,1",
        f"{T}009,31,categoryid,2",
        f"{T}000,31,888,n5 77",
    )
    write(
        tmp_path / "item_properties_part2.csv",
        "timestamp,itemid,property,value",
        f"{T}000,32,categoryid,1",
    )
    write(tmp_path / "category_tree.csv", "categoryid,parentid", "1,", "2,9")
    dataset = made(tmp_path, tmp_path, RetailRocket())
    assert [(line[1], line[3]) for line in lines(dataset)] == [("31", 1), ("32", 3), ("32", 4)]
    items = {row["item_id"]: row for row in dataset.items.to_pylist()}
    assert items["31"]["category"] == "2"
    assert items["31"]["parent_category"] == "9"
    alone = made(tmp_path / "b", tmp_path / "events.csv", RetailRocket())
    assert alone.num_items == 2


def test_otto(tmp_path: Path) -> None:
    sessions = [
        {
            "session": 1,
            "events": [
                {"aid": i, "ts": T * 1000, "type": t}
                for i, t in ((9, "clicks"), (3, "carts"), (5, "orders"))
            ],
        },
        {"session": 2, "events": [{"aid": 3, "ts": T * 1000 + 1, "type": "clicks"}]},
    ]
    path = write(tmp_path / "train.jsonl", *map(json.dumps, sessions))
    dataset = made(tmp_path, path, Otto())
    assert [(line[1], line[3]) for line in lines(dataset)] == [
        ("9", 1),
        ("3", 3),
        ("5", 4),
        ("3", 1),
    ]
    sessions[1]["events"][0]["type"] = "likes"
    path = write(tmp_path / "bad.jsonl", *map(json.dumps, sessions))
    assert "bad.jsonl: row 2: type is 'likes'" in refused_again_with(tmp_path, path, Otto())


def refused_again_with(tmp_path: Path, path: Path, source: Any) -> str:
    return refused(tmp_path / "again", path, source)


def fields(config: Mapping) -> set[str]:
    return {name for name in config if name != "_target_"}


OURS = ("events", "sequences", "movielens", "amazon", "taobao", "retailrocket", "otto")


@pytest.mark.parametrize("name", OURS)
def test_configs_mirror_their_constructors(name: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from recsys.data.prepare import PrepareSettings

    text = (CONFIGS / "data" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "data.path" in text.split("name:")[0]
    config = OmegaConf.create(text)
    source = instantiate(config.source)
    assert fields(config.source) == set(source.__dataclass_fields__)
    settings = PrepareSettings.of(config)
    assert settings.name == name
    assert settings.path is None
    assert settings.memory_limit == "2GB"


def test_hydra_settings_reach_the_manifest(tmp_path: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(CONFIGS / "data" / "events.yaml")
    rows = (f"a,{'xyz'[i % 3]},{T + i}" for i in range(10))
    config.path = str(write(tmp_path / "log.csv", HEAD, *rows))
    split = OmegaConf.load(CONFIGS / "split" / "leave_one_out.yaml")
    dataset = prepare(config, instantiate(config.source), split, Workspace(tmp_path / "w"))
    assert dataset.manifest["prepare"]["source"]["columns"]["user_id"] == "user_id"
    temporal = OmegaConf.load(CONFIGS / "split" / "temporal.yaml")
    cut = prepare(config, instantiate(config.source), temporal, Workspace(tmp_path / "w"))
    assert cut.manifest["split"]["test_from"] == (T + 9) * 1000


LOG = [f"u{n % 4},i{n % 5},{T + n}" for n in range(40)]


def test_the_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    import pandas as pd

    rows = [row.split(",") for row in LOG]
    log = pd.DataFrame(rows, columns=HEAD.split(","))
    items = pd.DataFrame({"item_id": ["i0", "i1"], "price": [1.0, 2.0]}, index=[7, 9])
    plain, indexed = tmp_path / "plain.csv", tmp_path / "indexed.csv"
    log.to_csv(plain, index=False)
    log.to_csv(indexed)
    items.to_csv(tmp_path / "items.csv")
    items.to_parquet(tmp_path / "items.parquet")
    read = [
        made(tmp_path, plain, Events()),
        made(tmp_path, indexed, Events(items=str(tmp_path / "items.csv"))),
        made(tmp_path, indexed, Events(items=str(tmp_path / "items.parquet"))),
    ]
    assert lines(read[0]) == lines(read[1]) == lines(read[2])
    assert [one.manifest["item_features"] for one in read[1:]] == [{"price": "numeric"}] * 2


@pytest.mark.parametrize("released", ["1970-01-03", "1970-01-03 00:00:00"])
def test_a_date_of_an_item_is_days_since_1970(tmp_path: Path, released: str) -> None:
    log = write(tmp_path / "log.csv", HEAD, *LOG)
    items = write(tmp_path / "items.csv", "item_id,released", f"i0,{released}", "i1,")
    dataset = made(tmp_path, log, Events(items=str(items)))
    items_, days = (dataset.items[name].to_pylist() for name in ("item_id", "released"))
    found = dict(zip(items_, days, strict=True))
    assert (found["i0"], found["i1"], found["i2"]) == (2.0, None, None)
    told = Events(items=str(items))
    chosen = made(tmp_path, log, told, item_features={"released": "categorical"})
    assert chosen.items["released"].to_pylist()[items_.index("i0")] == released


def test_an_item_table_of_other_ids_is_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEAD, *LOG)
    items = write(tmp_path / "items.csv", "item_id,price", "0,1", "1,2")
    with pytest.raises(InputError, match=r"none of the log's item_ids.*'i0'.*the table '0'"):
        made(tmp_path, log, Events(items=str(items)))


def test_what_spark_marks_as_no_data_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    for name in ("_temporary/0", "day=1", ".hidden"):
        (folder / name).mkdir(parents=True)
        rows = [row.split(",") for row in LOG]
        columns = {n: [row[k] for row in rows] for k, n in enumerate(HEAD.split(","))}
        pq.write_table(pa.table(columns), folder / name / "part.parquet")
    (folder / "_metadata.parquet").write_bytes(b"")
    assert made(tmp_path, folder, Events()).manifest["source_rows"] == len(LOG)


def test_a_packed_log_may_be_named_in_capitals(tmp_path: Path) -> None:
    packed = write(tmp_path / "log.csv.gz", HEAD, *LOG)
    loud = packed.rename(tmp_path / "LOG.CSV.GZ")
    assert len(lines(made(tmp_path, loud, Events()))) == len(LOG)


def test_settings_of_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    from recsys.data.grow import Growth

    log = write(tmp_path / "log.csv", HEAD, *LOG)
    assert len(lines(made(tmp_path, log, Events(columns=None)))) == len(LOG)
    with pytest.raises(InputError, match=r"data.spill=.*name a folder"):
        made(tmp_path, log, Events(), spill=str(log), min_user_events=2)
    with pytest.raises(InputError, match=r"grow.keep_days=abc: expected days"):
        Growth(onto="latest", keep_days="abc")  # type: ignore[arg-type]
    items = write(tmp_path / "items.csv", "item_id,Rank", "i0,1")
    with pytest.raises(InputError, match="'Rank' is a name of recsys's own"):
        made(tmp_path, log, Events(items=str(items)))
