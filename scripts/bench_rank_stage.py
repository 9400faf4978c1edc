"""How long the ranking stage of a bundle takes: one request at a time, on one core.

    recsys export RANKER && python scripts/bench_rank_stage.py
    python scripts/bench_rank_stage.py --bundle workspace/bundles/NAME --requests 5000

The engine's own clock is read: `rank` is everything after the search, features and rules included.
Histories are as long as the ranker reads; 200 candidates as retrieved, 1,000 as a caller's own.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from recsys.artifacts import Workspace
from recsys.serving.engine import Engine, use_one_core
from recsys.serving.messages import HistoryEvent, RankRequest, RecommendRequest
from recsys.serving.ranking import Ranker

WARM = 200
MANY = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", default="latest")
    parser.add_argument("--requests", type=int, default=5_000)
    given = parser.parse_args()
    use_one_core()
    engine = Engine.load(Workspace().find("bundle", given.bundle))
    if engine.ranker is None:
        raise SystemExit(f"{engine.version} has no ranker: recsys export the run of one")
    paths = histories(engine, given.requests + WARM)
    table = Table(title=titled(engine, engine.ranker), box=box.SIMPLE_HEAD)
    for column in ("candidates", "p50 ms", "p95 ms", "p99 ms", "most ms"):
        table.add_column(column, justify="right")
    found = timed(engine, paths, lambda path: engine.recommend([asked(path)])[0])
    table.add_row(str(engine.ranker.candidates), *cells(found))
    items = engine.catalogue.ids[1 : MANY + 1]
    found = timed(
        engine, paths[: WARM + given.requests // 5], lambda path: own(engine, path, items)
    )
    table.add_row(f"{len(items):,} of the caller", *cells(found))
    Console().print(table)


def histories(engine: Engine, count: int) -> list[list[HistoryEvent | str]]:
    """Return random paths, each as long as the encoder reads."""
    rng = np.random.default_rng(0)
    length = engine.bundle.max_length
    items = np.array(engine.catalogue.ids[1:])[
        rng.integers(len(engine.catalogue.ids) - 1, size=(count, length))
    ]
    moments = 1_767_225_600 + np.cumsum(rng.integers(5, 5_000, size=(count, length)), axis=1)
    return [
        [HistoryEvent(item, timestamp=int(t)) for item, t in zip(row, times, strict=True)]
        for row, times in zip(items.tolist(), moments, strict=True)
    ]


def asked(path: list[Any]) -> RecommendRequest:
    return RecommendRequest(history=path, k=20, now=path[-1].timestamp + 30)


def own(engine: Engine, path: list[Any], items: Sequence[str]) -> Any:
    return engine.rank(
        RankRequest(items=list(items), history=path, k=20, now=path[-1].timestamp + 30)
    )


def timed(engine: Engine, paths: list[Any], answer: Callable[[Any], Any]) -> NDArray[np.float64]:
    """Return the milliseconds of the ranking stage of each request after the first few."""
    return np.array([answer(path).timings_ms["rank"] for path in paths])[WARM:]


def cells(found: NDArray[np.float64]) -> list[str]:
    return [f"{value:.2f}" for value in (*np.percentile(found, [50, 95, 99]), found.max())]


def titled(engine: Engine, ranker: Ranker) -> str:
    layout = ranker.encoded.features.layout if ranker.encoded else None
    columns = 0
    if layout is not None:
        parts = (layout.request_codes, layout.request_numbers, layout.item_codes)
        columns = sum(map(len, (*parts, layout.item_numbers, layout.cross_numbers)))
        columns += layout.vector_width > 0
    length = engine.bundle.max_length
    return f"{engine.version}: {columns} columns, history {length}, {platform.machine()}"


if __name__ == "__main__":
    main()
