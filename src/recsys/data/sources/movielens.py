"""MovieLens latest-small, 20M, 25M, 32M (CSV), 1M (`::`) and 100K (tabs), titles and genres."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recsys.data.sources import Tables
from recsys.data.sources.canonical import Log
from recsys.data.sources.files import (
    delimited,
    existing,
    header,
    inside,
    kept_rows,
    mapped,
    open_text,
    reading,
)
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis

NAMES = {"user_id": "userId", "item_id": "movieId", "value": "rating", "timestamp": "timestamp"}
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
NO_GENRES = "(no genres listed)"
YEAR = re.compile(r"\((\d{4})\)\s*$")


class Movie(NamedTuple):
    """One row of the item table."""

    item_id: str
    title: str
    year: int | None
    genres: list[str]


@dataclass(frozen=True)
class MovieLens:
    """A MovieLens folder as it comes out of its zip; which one is told by the files in it.

    min_rating: leave out ratings below this; null keeps all.
    """

    min_rating: float | None = None

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Read ratings as events (value is the rating), movies as items, people where given."""
        folder = existing(path)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: expected the unpacked folder, not a file; set data.path={folder.parent}"
            )
        ratings = inside(folder, ("ratings.csv", "ratings.dat", "u.data"))
        events = Log(_ratings(con, ratings), ratings.name, NAMES).events()
        kept = events if self.min_rating is None else events.filter(events.value >= self.min_rating)
        dropped = {} if self.min_rating is None else {"low_rating": _count(events) - _count(kept)}
        with reading(folder):
            movies, people = list(_movies(folder)), list(_people(folder))
        return Tables(
            kept,
            _table(con, "movies", movies, scratch),
            _table(con, "people", people, scratch) if people else None,
            has_time=True,
            dropped=dropped,
        )


def _count(table: ibis.Table) -> int:
    return int(table.count().to_pyarrow().as_py())


def _ratings(con: ibis.BaseBackend, file: Path) -> ibis.Table:
    if file.name.startswith("ratings.csv"):
        mapped(header(file, ","), NAMES, (), file.name)
        table = delimited(con, file)
    else:
        separator = "::" if file.name.startswith("ratings.dat") else "\t"
        table = delimited(con, file, delimiter=separator, names=tuple(NAMES.values()))
    return kept_rows(
        con, "raw_events", table.select(**{ours: table[name] for ours, name in NAMES.items()}), file
    )


def _movies(folder: Path) -> Iterator[Movie]:
    file = inside(folder, ("movies.csv", "movies.dat", "u.item"))
    if file.name.startswith("movies.csv"):
        with open_text(file) as stream:
            for row in csv.DictReader(stream):
                yield _movie(row["movieId"], row["title"], row["genres"].split("|"))
    elif file.name.startswith("movies.dat"):
        for fields in _fields(file, "::"):
            yield _movie(fields[0], fields[1], fields[2].split("|"))
    else:
        for fields in _fields(file, "|"):
            flags = zip(GENRES_100K, fields[5:24], strict=True)
            yield _movie(fields[0], fields[1], [genre for genre, flag in flags if flag == "1"])


def _movie(item_id: str, title: str, genres: list[str]) -> Movie:
    year = YEAR.search(title)
    return Movie(
        item_id, title, int(year[1]) if year else None, [g for g in genres if g != NO_GENRES]
    )


class Person(NamedTuple):
    """One row of the user table."""

    user_id: str
    gender: str
    age: int
    occupation: str


def _people(folder: Path) -> Iterator[Person]:
    """Yield the people of 1M and 100K; the other releases say nothing about them."""
    if (folder / "users.dat").is_file():
        for user, gender, age, occupation, *_ in _fields(folder / "users.dat", "::"):
            yield Person(user, gender, int(age), occupation)
    elif (folder / "u.user").is_file():
        for user, age, gender, occupation, *_ in _fields(folder / "u.user", "|"):
            yield Person(user, gender, int(age), occupation)


def _fields(file: Path, separator: str) -> Iterator[list[str]]:
    # The old releases are Latin-1: "Misérables" is not valid UTF-8 there.
    with open_text(file, encoding="latin-1") as stream:
        for line in stream:
            if line.strip():
                yield line.rstrip("\r\n").split(separator)


def _table(
    con: ibis.BaseBackend, name: str, rows: list[Movie] | list[Person], scratch: Path
) -> ibis.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = scratch / f"{name}.parquet"
    columns = {key: [getattr(row, key) for row in rows] for key in rows[0]._fields}
    pq.write_table(pa.table(columns), file)
    return con.read_parquet(str(file))
