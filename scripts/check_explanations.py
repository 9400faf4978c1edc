"""Whether explanations are true: what is left of a score without the reasons that were given.

    python scripts/check_explanations.py                    # the newest bundle, 300 people
    python scripts/check_explanations.py --bundle NAME --people 1000

Of each person's first recommendation the reasons are asked for, and the item is scored again
without the first one, two, three of them, taken away together; beside that, without as many other
items of the path, drawn at random, and without the newest. If the reasons are the model's own, the
score falls furthest without them (comprehensiveness: DeYoung et al. 2020, section 4). Prints mean
falls with 95 % intervals over people, as shares of the mean score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recsys.artifacts import Workspace
from recsys.evaluation.significance import bootstrap
from recsys.schema import EVENT_TYPES
from recsys.serving.engine import Engine, use_one_core
from recsys.serving.explain_messages import ExplainRequest
from recsys.serving.messages import HistoryEvent, RecommendRequest

WAYS = ("the reasons", "the newest", "at random")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", default="latest")
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--reasons", type=int, default=3, help="taken away at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    use_one_core()
    engine = Engine.load(Workspace().find("bundle", given.bundle))
    draws = np.random.default_rng(given.seed)
    histories = people(engine, given.people, given.reasons, draws)
    if not histories:
        raise SystemExit(
            f"{engine.version}: nobody in it has {given.reasons + 1} items; lower --reasons"
        )
    console = Console(stderr=True)
    asking = track(histories, "Asking", console=console)
    found = [falls(engine, one, given.reasons, draws) for one in asking]
    score_U, fall_UWM = np.array([s for s, _ in found]), np.array([f for _, f in found])
    report = {
        way: (fall_UWM[:, w].mean(axis=0) / score_U.mean()).tolist() for w, way in enumerate(WAYS)
    }
    Console().print(shown(engine.version, fall_UWM, score_U, given.seed))
    print(
        json.dumps({"people": len(histories), "mean_score": float(score_U.mean()), "falls": report})
    )


def people(
    engine: Engine, count: int, most: int, draws: np.random.Generator
) -> list[list[HistoryEvent]]:
    """Return the stored histories of some people who did something with more than `most` items."""
    reader, found = engine.reader, list[list[HistoryEvent]]()
    for user_id in draws.permutation(np.array(engine.bundle.users.ids.to_pylist())).tolist():
        _, path = reader.path(RecommendRequest(user_id=user_id), None, 0, [])
        path = path.last(reader.reach)
        if len(set(path.items.tolist())) > most:
            ids = [engine.catalogue.ids[item] for item in path.items.tolist()]
            kinds = [EVENT_TYPES[code - 1] for code in path.types.tolist()]
            values = [None if np.isnan(value) else value for value in path.values.tolist()]
            rows = zip(ids, kinds, path.times.tolist(), values, strict=True)
            found.append([HistoryEvent(*row) for row in rows])
        if len(found) == count:
            break
    return found


def falls(
    engine: Engine, history: Sequence[HistoryEvent], most: int, draws: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    """Return the first recommendation's score, and how far it falls: [ways, 1 to `most` items]."""
    now = float(history[-1].timestamp) + 60_000
    (answer,) = engine.recommend([RecommendRequest(history=[*history], k=1, now=now)])
    asked = [answer.items[0].item_id]
    why = engine.explain(ExplainRequest(items=asked, history=[*history], now=now, reasons=most))
    newest = [*dict.fromkeys(event.item_id for event in reversed(history))]
    orders = (
        [reason.name for reason in why.items[0].reasons],
        newest[:most],
        draws.permutation(newest)[:most].tolist(),
    )

    def score(without: Sequence[str]) -> float:
        left = [event for event in history if event.item_id not in without]
        return engine.scores(RecommendRequest(history=left, now=now), asked)[0]

    whole = score(())
    fall_WM = [[whole - score(order[: m + 1]) for m in range(most)] for order in orders]
    return whole, np.array(fall_WM)


def shown(
    title: str, fall_UWM: NDArray[np.float64], score_U: NDArray[np.float64], seed: int
) -> Table:
    """Return the falls as a table."""
    table = Table(title=f"{title}: {len(score_U)} people", box=box.SIMPLE_HEAD)
    table.add_column("taken away")
    counts = range(fall_UWM.shape[2])
    for count in range(1, len(counts) + 1):
        table.add_column(f"{count} item{'s' * (count > 1)}", justify="right")
    for place, way in enumerate(WAYS):
        table.add_row(way, *(cell(fall_UWM[:, place, m], score_U, seed) for m in counts))
    return table


def cell(fall_U: NDArray[np.float64], score_U: NDArray[np.float64], seed: int) -> str:
    """Return a mean fall and its interval, in hundredths of the mean score."""
    found, scale = bootstrap(fall_U, seed=seed), 100 / score_U.mean()
    return f"{found.mean * scale:.1f} % ({found.low * scale:.1f} to {found.high * scale:.1f})"


if __name__ == "__main__":
    main()
