"""What is in a dataset, for the terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def summary(dataset: Dataset) -> RichTable:
    """Return a table of what is in a dataset, for the terminal."""
    from rich.table import Table

    manifest, lengths = dataset.manifest, np.diff(dataset.offsets)
    split = dataset.split
    table = Table("", "", title=f"dataset {dataset.path.name}", show_header=False)
    rows = {
        "users": f"{dataset.num_users:,}",
        "items": f"{dataset.num_items:,}",
        "events": f"{int(lengths.sum()):,} of {manifest['source_rows']:,} read",
        "dropped": ", ".join(f"{n:,} {why}" for why, n in manifest["dropped"].items()),
        "not read": _skipped(manifest.get("skipped", [])),
        "event types": ", ".join(manifest["event_types"]),
        "events a user": _lengths(lengths),
        "impressions": _impressions(manifest.get("impressions")),
        "time": _span(dataset),
        "split": str(manifest["split"]["rule"]),
        "train": f"{int(split.train_end.sum()):,} events",
        "validation": f"{int((split.validation >= 0).sum()):,} users",
        "test": f"{int((split.test >= 0).sum()):,} users",
        "item features": ", ".join(f"{n} ({k})" for n, k in manifest["item_features"].items()),
        "user features": ", ".join(f"{n} ({k})" for n, k in manifest["user_features"].items()),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _skipped(what: list[str]) -> str:
    more = f"; and {len(what) - 3} more in its manifest" if len(what) > 3 else ""
    return f"{len(what)}: {'; '.join(what[:3])}{more}" if what else ""


def _lengths(lengths: NDArray[np.int64]) -> str:
    return f"median {np.median(lengths):,.0f}, most {lengths.max():,}" if len(lengths) else ""


def _impressions(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    context = f"; context {', '.join(facts['context'])}" if facts["context"] else ""
    return (
        f"{facts['rows']:,} in {facts['requests']:,} requests; labels "
        f"{', '.join(facts['labels'])}{context}"
    )


def _span(dataset: Dataset) -> str:
    if not dataset.has_time:
        return "an order only"
    if not len(times := dataset.events["times"]):
        import pyarrow.parquet as pq

        file = dataset.path / "impressions.parquet"
        times = pq.read_table(file, columns=["timestamp"])["timestamp"].to_numpy()
    ends = (datetime.fromtimestamp(int(t) / 1000, UTC) for t in (times.min(), times.max()))
    return " to ".join(f"{end:%Y-%m-%d}" for end in ends)
