"""Do off-policy estimates hold what they promise? Ask a shop whose truth is known, seed by seed.

    python scripts/check_policy.py --seeds 100      # some minutes on one core

Each seed is a shop of its own. Answers to a part of its moments are the log; from it the value of
two other policies is estimated: the log's own order without its exploration, and another ranker's
order, explored as the log was. The truth is what they earn over all moments of that shop by its
exact law. DR's model counts rewards by place and score in answers that are not in the log. Counted
is in how many seeds the 95 % interval holds the truth; exits with 1 where it is under 90 of 100.

Shapes: B answers, K places, M items of the pool.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recsys.data.shop_answers import EXPLORE, SLATE, Answers, ShopAnswers, Signs, examined
from recsys.data.synthetic import SyntheticShop
from recsys.evaluation.policy import (
    Estimate,
    Logged,
    doubly_robust,
    expected_rewards,
    ips,
    shown_chances,
    snips,
)

USERS, EVENTS = 600, 30
"""Of each shop; all its moments are asked after."""
SHARES = np.cumsum([1 / 3, 1 / 6])
"""The log's share of the moments, and that of the answers that DR's model counts."""
BINS = 8
BAR = 0.9
TASKS = ("view", "purchase")
PLACES = np.arange(SLATE)


@dataclass(frozen=True)
class Asked:
    """All answers of a shop: shown_BK, labels task → [B, K], chance task → [B, M] if examined."""

    shown_BK: NDArray
    labels: dict[str, NDArray]
    propensity_BK: NDArray
    chance: dict[str, NDArray]
    score_BM: NDArray

    def part(self, chosen: NDArray) -> Asked:
        labels, chance = ({k: v[chosen] for k, v in d.items()} for d in (self.labels, self.chance))
        columns = self.shown_BK[chosen], labels, self.propensity_BK[chosen], chance
        return Asked(*columns, self.score_BM[chosen])


def ask(seed: int) -> Asked:
    """Answer at all moments of a shop."""
    size = USERS * EVENTS * SLATE
    shop = SyntheticShop(
        num_users=USERS, num_items=200, events_per_user=EVENTS, seed=seed, impressions=size
    )
    made = ShopAnswers(shop)
    parts = [_known(answers, made) for answers in made.batches()]
    labels, chance = ({t: _join(p[k][t] for p in parts) for t in TASKS} for k in (1, 3))
    shown_BK, propensity_BK, score_BM = (_join(part[k] for part in parts) for k in (0, 2, 4))
    return Asked(shown_BK, labels, propensity_BK, chance, score_BM)


def _known(answers: Answers, made: ShopAnswers) -> tuple:
    asked = answers.histories, answers.now, answers.device, answers.pool_BM
    signs: Signs = made.truth.signs(*asked)
    view = signs.view()
    chance = {"view": view, "purchase": view * signs.cart() * signs.purchase()}
    score = signs.next + 2 * signs.desire
    return answers.shown_BK, answers.labels, answers.propensity_BK, chance, score


def _join(parts: Iterator[NDArray]) -> NDArray:
    return np.concatenate(list(parts))


def policies(asked: Asked) -> dict[str, NDArray]:
    """Return how probable each policy shows each item of the pool at each place: [B, K, M]."""
    size = asked.score_BM.shape[1]
    base_BK = np.broadcast_to(PLACES, asked.shown_BK.shape)
    better_BK = np.argsort(-asked.score_BM, axis=1, kind="stable")[:, :SLATE]
    return {
        "same order, no exploration": _explored(base_BK, size, 0.0),
        "another ranker's order": _explored(better_BK, size, EXPLORE),
    }


def _explored(order_BK: NDArray, size: int, explore: float) -> NDArray:
    target_BKM = np.full((*order_BK.shape, size), explore / (size - 1))
    np.put_along_axis(target_BKM, order_BK[:, :, None], 1 - explore, axis=2)
    return target_BKM


def counted(learnt: Asked, task: str, score_BM: NDArray) -> NDArray:
    """Return a plain model's rewards [B, K, M]: the mean by place and bin of the score."""
    edges = np.quantile(learnt.score_BM, np.linspace(0, 1, BINS + 1)[1:-1])
    shown = np.take_along_axis(learnt.score_BM, learnt.shown_BK, axis=1)
    cell = np.searchsorted(edges, shown) * SLATE + PLACES
    size = BINS * SLATE
    done = np.bincount(cell.ravel(), learnt.labels[task].ravel(), minlength=size)
    mean = done / np.maximum(np.bincount(cell.ravel(), minlength=size), 1)
    return mean.reshape(BINS, SLATE).T[PLACES[:, None], np.searchsorted(edges, score_BM)[:, None]]


def estimates(log: Asked, task: str, target_BKM: NDArray, model_BKM: NDArray) -> list[Estimate]:
    """Estimate a policy's reward in each way."""
    answers, places = log.shown_BK.shape
    offsets = np.arange(answers + 1) * places
    positions = np.tile(PLACES, answers)
    logged = Logged(offsets, positions, log.propensity_BK.ravel(), log.labels[task].ravel())
    target_R = shown_chances(target_BKM, log.shown_BK)
    predicted_R = shown_chances(model_BKM, log.shown_BK)
    expected_B = expected_rewards(target_BKM, model_BKM)
    robust = doubly_robust(logged, target_R, predicted_R, expected_B)
    return [ips(logged, target_R), snips(logged, target_R), robust]


def judge(seed: int) -> Iterator[tuple[tuple[str, str, str], float, Estimate]]:
    """Give (policy, task, estimator), the truth and the estimate, of one shop."""
    asked = ask(seed)
    part = np.searchsorted(SHARES, np.random.default_rng(seed).random(len(asked.shown_BK)), "right")
    log, learnt = asked.part(part == 0), asked.part(part == 1)
    for policy, target_BKM in policies(asked).items():
        for task in TASKS:
            reward_BKM = asked.chance[task][:, None] * examined(PLACES)[:, None]
            truth = float(expected_rewards(target_BKM, reward_BKM).mean())
            model_BKM = counted(learnt, task, log.score_BM)
            made = estimates(log, task, target_BKM[part == 0], model_BKM)
            for name, estimate in zip(("IPS", "SNIPS", "DR"), made, strict=True):
                yield (policy, task, name), truth, estimate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=100)
    seeds, began = parser.parse_args().seeds, time.perf_counter()
    rows: dict[tuple[str, str, str], list[tuple[float, Estimate]]] = {}
    for seed in track(range(seeds), "shops", console=Console(stderr=True)):
        for key, truth, estimate in judge(seed):
            rows.setdefault(key, []).append((truth, estimate))
    table = Table(title=f"{seeds} shops, {time.perf_counter() - began:.0f} s", box=box.SIMPLE_HEAD)
    for column in ("policy", "reward", "estimator", "truth", "estimate", "± half", "effective"):
        table.add_column(column, no_wrap=True)
    table.add_column("holds the truth", justify="right")
    held = [_add(table, key, found) for key, found in rows.items()]
    Console(width=130).print(table)
    return int(min(held) < BAR)


def _add(table: Table, key: tuple[str, ...], found: list[tuple[float, Estimate]]) -> float:
    held = float(np.mean([made.low <= truth <= made.high for truth, made in found]))
    truth, value, half, effective = np.mean(
        [(t, e.value, (e.high - e.low) / 2, e.effective) for t, e in found], axis=0
    )
    figures = f"{truth:.4f}", f"{value:.4f}", f"{half:.4f}", f"{effective:,.0f}"
    table.add_row(*key, *figures, f"{held:.0%}")
    return held


if __name__ == "__main__":
    sys.exit(main())
