"""What decides how a dataset is prepared: the `data:` group of the config, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from recsys.artifacts import SCHEMA_VERSIONS
from recsys.data.sources import Source
from recsys.data.splits import SplitRule
from recsys.schema import InputError, suggestion

STAYS_THE_SAME = ("memory_limit", "threads", "spill", "engine", "master")
"""Settings that change how a dataset is made but not what is in it."""
ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class PrepareSettings:
    """The `data:` group of the config, without its source.

    min_user_events, min_item_events: rarer items go first, then users left with too few.
    k_core: do both again and again until every user and item has at least this many.
    deduplicate: keep one of events equal in user, item, type and time.
    item_features, user_features, request_features: column → kind, where the guess from its type
    is wrong; those of requests are the context columns of impressions.
    memory_limit: DuckDB's, e.g. 2GB; past it data spill to `spill` (default: beside the dataset).
    engine: duckdb, or spark for what grows with the log; the dataset is the same to the byte.
    master: Spark's, e.g. spark://host:7077 or local[8]; by default that of the session that runs or
    of `spark-submit`, else this machine with `threads` and `memory_limit`.
    """

    name: str
    path: str | None = None
    min_user_events: int = 1
    min_item_events: int = 1
    k_core: int | None = None
    deduplicate: bool = True
    item_features: Mapping[str, str] = field(default_factory=dict)
    user_features: Mapping[str, str] = field(default_factory=dict)
    request_features: Mapping[str, str] = field(default_factory=dict)
    memory_limit: str = "2GB"
    threads: int = 2
    spill: str | None = None
    engine: str = "duckdb"
    master: str | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise InputError(f"data.name={self.name!r}: expected a plain name for a folder")
        for name in ("min_user_events", "min_item_events", "k_core", "threads"):
            value = getattr(self, name)
            allowed = value is None and name == "k_core"
            if not allowed and (type(value) is not int or value < 1):
                raise InputError(f"data.{name}={value}: expected a whole number, at least 1")
        if not isinstance(self.deduplicate, bool):
            raise InputError(f"data.deduplicate={self.deduplicate}: expected true or false")
        if self.engine not in ENGINES:
            raise InputError(
                f"data.engine={self.engine}: expected one of {', '.join(ENGINES)}"
                + suggestion(self.engine, ENGINES)
            )
        if self.master is not None and self.engine != "spark":
            raise InputError(
                f"data.master={self.master} is Spark's and has no effect on {self.engine}; leave "
                "it out, or type data.engine=spark"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PrepareSettings:
        """Return the settings of a config group; its `source` node belongs to the source."""
        known = [one.name for one in fields(cls)]
        # `get` gives None for a value still missing (`???`), and the source then says so.
        given: dict[str, Any] = {
            str(name): settings.get(name) for name in settings if name != "source"
        }
        for name in given:
            if name not in known:
                raise InputError(
                    f"data.{name}: no such setting; known are {', '.join(known)}"
                    + suggestion(str(name), known)
                )
        return cls(**given)

    def least(self, name: str) -> int:
        """Return how many events a `user` or an `item` needs to stay."""
        return max(getattr(self, f"min_{name}_events"), self.k_core or 1)


def resolved(settings: PrepareSettings, source: Source, rule: SplitRule) -> dict[str, Any]:
    """Return everything that decides what is in the dataset, as plain JSON values."""
    said = plain(source)
    names = [settings.path, *(said.values() if isinstance(said, dict) else ())]
    return plain(settings) | {
        "source": {"_target_": f"{type(source).__module__}.{type(source).__name__}", **said},
        "split": plain(rule),
        "schema_version": SCHEMA_VERSIONS["dataset"],
        "files": [stat for name in names if isinstance(name, str) for stat in _stats(name)],
    }


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as plain dicts and lists, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) or type(value).__name__ == "ListConfig":
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _stats(name: str) -> list[list[Any]]:
    """Return name, size and time of change of a file, or of every file in a folder."""
    path = Path(name).expanduser()
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    except OSError:
        return []
    stats = ((file, file.stat()) for file in files if file.is_file())
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
