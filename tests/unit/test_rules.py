"""Boosts and caps against brute force: whatever the search has seen, the answer is the true one."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from recsys.index.search import Hits
from recsys.schema import InputError
from recsys.serving.catalogue import Kept
from recsys.serving.messages import Boosts, RecommendRequest
from recsys.serving.rules import (
    NO_RULES,
    Rules,
    boosted,
    capped,
    resolved,
    rules_of,
    until_enough,
)

N = 60
AISLES = ("shoes", "hats", "books")


def no_categories(advice: str) -> None:
    raise InputError(f"no categories; {advice}")


CATALOGUE = SimpleNamespace(
    index={f"i{i}": i for i in range(1, N + 1)},
    members={name: np.arange(1 + at, N + 1, 3) for at, name in enumerate(AISLES)},
    categories=[None, *(AISLES[(i - 1) % 3] for i in range(1, N + 1))],
    need_categories=lambda advice: None,
)


@dataclass
class Known:
    """Items whose scores are given; items in `out` are not eligible."""

    scores: np.ndarray
    out: set[int] = field(default_factory=set)
    widths: list[int] = field(default_factory=list)

    def best(self, width: int) -> Hits:
        self.widths.append(width)
        order = [i for i in np.argsort(-self.scores, kind="stable").tolist() if i not in self.out]
        kept = [i for i in order if i][:width]
        return np.array(kept, np.int64), self.scores[kept]

    def score(self, indices: np.ndarray) -> np.ndarray:
        return self.scores[indices]

    def eligible(self, indices: np.ndarray) -> np.ndarray:
        return ~np.isin(indices, [*self.out])


def brute(source: Known, asked: Boosts, cap: int | None, k: int) -> list[int]:
    """Score everything, add everything, sort everything, walk down."""
    total = source.scores.astype(float).copy()
    for item, amount in asked.items.items():
        total[CATALOGUE.index.get(item, 0)] += amount
    for name, amount in asked.categories.items():
        total[CATALOGUE.members.get(name, 0)] += amount
    order = [int(i) for i in np.lexsort((np.arange(N + 1), -total)) if i and i not in source.out]
    shown: dict[str, int] = {}
    kept: list[int] = []
    for i in order:
        name = CATALOGUE.categories[i]
        if cap is None or shown.get(name, 0) < cap:
            shown[name] = shown.get(name, 0) + 1
            kept.append(i)
    return kept[:k]


def ruled(source: Known, asked: Boosts, cap: int | None, k: int) -> list[int]:
    boost = resolved(asked, CATALOGUE) if asked.items or asked.categories else None

    def attempt(width: int) -> tuple[Hits, bool]:
        hits, complete = boosted(source, boost, width)
        return capped(hits, cap, k, CATALOGUE.categories), complete

    return until_enough(k, k, attempt)[0].tolist()


ASKED = [
    Boosts(),
    Boosts(items={"i60": 100.0}),
    Boosts(items={"i60": 100.0, "i1": -100.0, "i2": -100.0, "i3": -100.0}),
    Boosts(categories={"hats": 3.0}),
    Boosts(categories={"hats": -50.0, "books": -50.0}, items={"i2": 100.0, "gone": 5.0}),
    Boosts(categories={"hats": 1.0, "books": 0.5, "shoes": -2.0}),
]


@pytest.mark.parametrize("cap", [None, 1, 2, 7])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("k", [1, 5, 30, 100])
def test_rules_are_as_if_everything_was_scored(asked: Boosts, cap: int | None, k: int) -> None:
    rng = np.random.default_rng(k)
    for out in (set(), {60}, {1, 4, 7, 10, 60}):
        source = Known(np.append(-np.inf, rng.normal(size=N)), out)
        assert ruled(source, asked, cap, k) == brute(source, asked, cap, k)


def test_a_boosted_item_enters_from_the_very_end() -> None:
    source = Known(-np.arange(N + 1.0))
    assert ruled(source, Boosts(items={"i60": 59.5}), None, 3) == [60, 1, 2]
    assert source.widths == [3]


def test_a_cap_looks_further_only_as_far_as_it_must() -> None:
    source = Known(-np.arange(N + 1.0))
    source.out = {i for i in range(1, 31) if i % 3 != 1}  # of the first 30, shoes alone are left
    assert ruled(source, Boosts(), 2, 4) == [1, 4, 32, 33]
    assert source.widths == [4, 16]
    assert ruled(source, Boosts(), 1, 100) == [1, 32, 33]


def test_an_item_of_several_categories_counts_in_each() -> None:
    categories = [None, ["a", "b"], "a", ["b", "c"], [], None, ["c", "c"], "c"]
    hits = np.arange(1, 8), np.arange(7.0, 0.0, -1.0)
    once = capped(hits, 1, 10, categories)
    assert (once[0].tolist(), once[1].tolist()) == ([1, 4, 5, 6], [7.0, 4.0, 3.0, 2.0])
    assert capped(hits, 2, 10, categories)[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert capped(hits, 2, 3, categories)[0].tolist() == [1, 2, 3]
    assert capped(hits, None, 3, categories)[0].tolist() == [1, 2, 3]


def test_boosts_of_one_item_add_up() -> None:
    boost = resolved(
        Boosts(items={"i2": 1.0, "i3": 4.0, "x": 1.0}, categories={"hats": 0.5, "y": 2.0}),
        CATALOGUE,
    )
    assert boost.of(np.array([1, 2, 3, 5, 60])).tolist() == [0, 1.5, 4, 0.5, 0]
    assert boost.named.tolist() == [2, 3]
    assert (boost.unknown_items, boost.unknown_categories) == (["x"], ["y"])


def test_no_rules_cost_nothing_and_boosts_are_resolved_once() -> None:
    kept = Kept(1 << 20)
    assert rules_of(RecommendRequest(), CATALOGUE, kept) is NO_RULES
    request = RecommendRequest(boosts=Boosts(categories={"hats": 1.0}))
    again = RecommendRequest(boosts=Boosts(categories={"hats": 1.0}), max_per_category=3)
    one, two = (rules_of(r, CATALOGUE, kept) for r in (request, again))
    assert one.boost is two.boost
    assert (one.cap, two.cap) == (None, 3)
    assert rules_of(RecommendRequest(max_per_category=3), CATALOGUE, kept) == Rules(cap=3)


@pytest.mark.parametrize(
    "fields", [{"max_per_category": 2}, {"boosts": Boosts(categories={"hats": 1.0})}]
)
def test_rules_on_categories_that_are_not_there_are_refused(fields: dict[str, object]) -> None:
    bare = SimpleNamespace(index=CATALOGUE.index, members={}, need_categories=no_categories)
    with pytest.raises(InputError, match=r"leave out max_per_category and boosts\.categories"):
        rules_of(RecommendRequest(**fields), bare, Kept(1000))
    assert rules_of(RecommendRequest(boosts=Boosts(items={"i1": 1.0})), bare, Kept(1000)).boost


@dataclass
class Heavy:
    nbytes: int


def test_what_was_not_used_longest_goes_first() -> None:
    kept, made = Kept(100), []

    def get(key: str, nbytes: int = 40) -> None:
        kept.get(key, lambda: made.append(key) or Heavy(nbytes))

    for key in "aba":
        get(key)
    get("c")  # b goes
    for key in "acb":
        get(key)
    assert "".join(made) == "abcb"
    get("huge", 101)
    get("huge", 101)
    assert made[-2:] == ["huge", "huge"]
    assert kept.nbytes == 80
