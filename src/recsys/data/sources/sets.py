"""Sets of files of what was shown: all there, all columns there, every value checked by row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ibis

from recsys.data.sources.canonical import LARGEST, Log, first
from recsys.data.sources.files import delimited, existing, header, kept_rows, reading
from recsys.schema import InputError

if TYPE_CHECKING:
    import ibis.expr.types as ir


@dataclass(frozen=True)
class ShownLog(Log):
    """One file of a set, its columns text under lower-case names, `row` counted from 0.

    part: train, validation or test, where the set is split by file. start: rows of the files
    before this one.
    """

    part: str = ""
    start: int = 0

    def ids(self, column: str) -> ir.Value:
        """Return ids as text; raise InputError for an empty one."""
        found = self._ids(column)
        self.check([found])
        return found.value

    def refuse(self, wrong: Mapping[str, ir.BooleanValue], expected: str) -> None:
        """Raise InputError naming the first row that is wrong in one of the columns.

        wrong: column → where it is so.
        """
        met = first(self.table.aggregate(**{name: one.any() for name, one in wrong.items()}))
        for column in [name for name in wrong if met and met[name]]:
            self._refuse(column, wrong[column], expected)

    def flags(self, columns: Iterable[str]) -> dict[str, ir.Value]:
        """Return columns of 0 or 1 as float32; raise InputError for anything else in them."""
        met = {name: self.table[name].try_cast("float64") for name in columns}
        self.refuse({k: v.isnull() | ~v.isin([0, 1]) for k, v in met.items()}, "expected 0 or 1")
        return {name: one.cast("float32") for name, one in met.items()}

    def numbers(self, columns: Iterable[str], least: float = -LARGEST) -> dict[str, ir.Value]:
        """Return columns as float64, null where nothing is; raise InputError for other text."""
        texts = {name: self.texts(name) for name in columns}
        met = {name: text.try_cast("float64") for name, text in texts.items()}
        more = "" if least == -LARGEST else f", {least:g} or more"
        self.refuse(
            {name: texts[name].notnull() & _is_no_number(one, least) for name, one in met.items()},
            f"expected a number{more}, or nothing",
        )
        return met

    def moments(self, column: str) -> ir.Value:
        """Return whole numbers as int64; raise InputError for anything else."""
        met = self.table[column].try_cast("int64")
        self.refuse({column: met.isnull()}, "expected a whole number")
        return met

    def texts(self, column: str) -> ir.Value:
        """Return text, null where the file has nothing."""
        return self.table[column].nullif("")

    def lists(self, column: str, separator: str) -> ir.Value:
        """Return the values that `separator` stands between; none where the file has nothing."""
        parts = ibis.coalesce(self.table[column], "").split(separator)
        return parts.filter(lambda one: one != "")

    @property
    def places(self) -> ir.Value:
        """The place of each row through all files of the set, from 0."""
        return self.table.row + self.start


def _is_no_number(met: ir.Value, least: float) -> ir.BooleanValue:
    return met.isnull() | met.isnan() | ~met.between(least, LARGEST)


def check_count(setting: str, value: object) -> None:
    """Raise InputError where a setting of a source is no whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise InputError(f"data.source.{setting}={value}: expected a whole number, 0 or more")


def home(path: Path | None, names: Sequence[str], what: str) -> Path:
    """Return the folder that holds all of `names` (globs): `path`, or a folder in it.

    what: the set, as the download script calls it. Raises InputError saying what is missing.
    """
    given = existing(path)
    needs = f"{what} needs {', '.join(names)}"
    if not given.is_dir():
        raise InputError(f"{given}: a file; {needs} in one folder. Type data.path={given.parent}")
    inner = sorted(one for one in given.iterdir() if one.is_dir())
    folder = next((one for one in (given, *inner) if there(one, names[0])), given)
    missing = [name for name in names if not there(folder, name)]
    if missing:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{folder}: no {missing[0]} in it; found {found}. {needs}; put it there, or see "
            f"python scripts/download.py {what}"
        )
    return folder


def there(folder: Path, name: str) -> list[Path]:
    """Return the files in `folder` that match the glob `name`, plain or `.gz`, in name order."""
    return sorted((*folder.glob(name), *folder.glob(f"{name}.gz")))


def shown_logs(
    con: ibis.BaseBackend,
    files: Sequence[tuple[Path, str]],
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    has_header: bool = True,
) -> list[ShownLog]:
    """Read (file, part) after (file, part) into DuckDB's storage, each once.

    columns: those to keep, by lower-case name; all of them, in order, where there is no header.
    Raises InputError for a missing column, a row of another width, and an empty file.
    """
    logs: list[ShownLog] = []
    start = 0
    for file, part in files:
        names = None if has_header else columns
        table = _kept(con, existing(file), columns, delimiter, names)
        logs.append(ShownLog(table, file.name, part=part, start=start))
        start += int(table.count().to_pyarrow().as_py())
    return logs


def _kept(
    con: ibis.BaseBackend,
    file: Path,
    columns: Sequence[str],
    delimiter: str,
    names: Sequence[str] | None,
) -> ir.Table:
    theirs = names or header(file, delimiter)
    known = {name.strip().lower(): name for name in theirs}
    for column in columns:
        if column not in known:
            raise InputError(
                f"{file}: no column {column!r}; found {', '.join(theirs)}. Expected "
                f"{', '.join(columns)}, separated by {delimiter!r}; fetch the file again"
            )
    with reading(file):
        table = delimited(con, file, delimiter=delimiter, names=names)
        chosen = table.select(**{column: table[known[column]] for column in columns})
        kept = kept_rows(con, f"raw_{re.sub(r'[^0-9A-Za-z]', '_', file.name)}", chosen, file)
    if not first(kept.select("row")):
        raise InputError(f"{file}: no rows in it, only a header or nothing; fetch it again")
    return kept


def together(
    logs: Sequence[ShownLog], columns: Callable[[ShownLog], Mapping[str, ir.Value]]
) -> ir.Table:
    """Return the rows of all files: `columns` of each, `row`, and `part` where a file is one."""
    tables = []
    for log in logs:
        part = {"part": ibis.literal(log.part)} if log.part else {}
        tables.append(log.table.select(**columns(log), **part, row=log.places))
    return tables[0].union(*tables[1:]) if len(tables) > 1 else tables[0]
