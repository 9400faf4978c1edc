"""The shop's answers: the same every time, drawn by the law and the propensities they state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from recsys.artifacts import Workspace
from recsys.data.prepare import prepare
from recsys.data.shop_answers import (
    DEVICES,
    EXPLORE,
    RECENT,
    SLATE,
    TASKS,
    Answers,
    AnswersTruth,
    ShopAnswers,
    answers_truth_of,
    examined,
)
from recsys.data.shop_stock import HOUR
from recsys.data.synthetic import Block, SyntheticShop, truth_of
from recsys.history import Histories
from recsys.schema import InputError

SHOP = SyntheticShop(
    num_users=500, num_items=200, num_aisles=10, events_per_user=30, seed=3, impressions=40_000
)
TRUTH = AnswersTruth(SHOP.truth())


Events = tuple[NDArray, NDArray, NDArray]


def events_of(histories: Histories, b: int) -> Events:
    """Items, types and times of one history."""
    part = slice(histories.offsets[b], histories.offsets[b + 1])
    return histories.items[part], histories.types[part], histories.times[part]


def joined(shop: SyntheticShop) -> Answers:
    """All answers of a shop in one piece."""
    parts = list(ShopAnswers(shop).batches())
    labels = {k: np.concatenate([p.labels[k] for p in parts]) for k in parts[0].labels}
    rest = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("users", "now", "device", "pool_BM", "shown_BK", "propensity_BK")
    }
    events = [events_of(one.histories, b) for one in parts for b in range(len(one.now))]
    return Answers(histories=Histories.of(events), labels=labels, **rest)


@pytest.fixture(scope="module")
def answers() -> Answers:
    return joined(SHOP)


@pytest.fixture(scope="module")
def block() -> Block:
    (only,) = SHOP.blocks()
    return only


def places(items_BC: NDArray) -> NDArray:
    return np.broadcast_to(np.arange(items_BC.shape[1]), items_BC.shape)


@pytest.fixture(scope="module")
def law(answers: Answers) -> dict[str, NDArray]:
    """What the truth says of everything shown."""
    device = [DEVICES[code] for code in answers.device]
    slate_BK = answers.slate_BK
    return TRUTH.probabilities(answers.histories, answers.now, device, slate_BK, places(slate_BK))


def auc(score: NDArray, label: NDArray) -> float:
    rank = np.empty(score.size)
    rank[np.argsort(score, axis=None)] = np.arange(1, score.size + 1)
    good = label.ravel() > 0
    ones = good.sum()
    return (rank[good].sum() - ones * (ones + 1) / 2) / (ones * (score.size - ones))


def test_same_settings_same_bytes(tmp_path: Path) -> None:
    small = replace(SHOP, num_users=50, impressions=2_000)
    for name in ("one", "two"):
        ShopAnswers(small).write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_blocks_do_not_show(answers: Answers) -> None:
    parted = joined(replace(SHOP, block_events=3_000))
    for name in ("users", "now", "device", "pool_BM", "shown_BK"):
        np.testing.assert_array_equal(getattr(parted, name), getattr(answers, name))
    for task in answers.labels:
        np.testing.assert_array_equal(parted.labels[task], answers.labels[task])


def test_fewer_answers_are_some_of_more(answers: Answers) -> None:
    fewer = joined(replace(SHOP, impressions=15_000))
    known = dict(zip(zip(answers.users, answers.now, strict=True), answers.slate_BK, strict=True))
    for user, now, slate in zip(fewer.users, fewer.now, fewer.slate_BK, strict=True):
        np.testing.assert_array_equal(known[user, now], slate)


@pytest.mark.parametrize("rounds", [0.3, 1.0, 2.5])
def test_size_is_about_as_asked(rounds: float) -> None:
    """Also where there are more answers than events."""
    asked = int(100 * 30 * SLATE * rounds)
    shop = replace(SHOP, num_users=100, impressions=asked)
    shown = sum(one.shown_BK.size for one in ShopAnswers(shop).batches())
    assert shown == pytest.approx(asked, rel=0.15)


def test_the_log_does_not_know_of_them(block: Block) -> None:
    (without,) = replace(SHOP, impressions=0).blocks()
    for one, other in zip(block, without, strict=True):
        np.testing.assert_array_equal(one, other)


def test_answers_lie_between_two_events(answers: Answers, block: Block) -> None:
    """What is in a history is what that user had done by then, the newest of it, and no more."""
    after_a_day = 0
    for b in range(0, len(answers.now), 7):
        user, now = answers.users[b], answers.now[b]
        own = slice(block.offsets[user], block.offsets[user + 1])
        before = block.times[own] < now
        items, _, _ = events_of(answers.histories, b)
        np.testing.assert_array_equal(items - 1, block.rows[own][before][-RECENT:])
        assert now not in block.times[own]
        after_a_day += now - block.times[own][before][-1] > 24 * HOUR
    assert after_a_day > 10


def test_pool_holds_distinct_items_on_sale(answers: Answers) -> None:
    sorted_BM = np.sort(answers.pool_BM, axis=1)
    assert (np.diff(sorted_BM, axis=1) > 0).all()
    assert (SHOP.stock.first_sale[answers.pool_BM - 1] <= answers.now[:, None]).all()


def test_pool_holds_what_comes_next(answers: Answers) -> None:
    """Half of the probability of the next event, and strangers to choose it from."""
    chance_BM = SHOP.truth().chances(answers.histories, answers.now, answers.pool_BM)
    assert 0.6 < chance_BM.sum(1).mean() < 0.95
    assert (chance_BM == 0).mean() > 0.2


def test_propensities_are_how_often_it_happens(answers: Answers) -> None:
    size = answers.pool_BM.shape[1]
    counts = np.zeros((SLATE, size))
    np.add.at(counts, (places(answers.shown_BK), answers.shown_BK), 1)
    expected = np.full((SLATE, size), EXPLORE / (size - 1))
    np.fill_diagonal(expected, 1 - EXPLORE)
    spread = np.sqrt(len(answers.now) * expected * (1 - expected))
    assert (np.abs(counts - len(answers.now) * expected) < 4.5 * spread).all()
    stated = expected[places(answers.shown_BK), answers.shown_BK]
    np.testing.assert_allclose(answers.propensity_BK, stated)
    assert (np.diff(np.sort(answers.slate_BK, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_calibrated(answers: Answers, law: dict[str, NDArray], task: str) -> None:
    """Of shown items given probability p, a share p is viewed or bought, for every p."""
    chance, label = law[task].ravel(), answers.labels[task].ravel()
    for part in np.array_split(np.argsort(chance), 8):
        spread = np.sqrt((chance * (1 - chance))[part].sum())
        assert abs(label[part].sum() - chance[part].sum()) < 4 * spread + 1


@pytest.mark.parametrize("task", TASKS)
def test_truth_ranks_as_intended(answers: Answers, law: dict[str, NDArray], task: str) -> None:
    assert 0.75 < auc(law[task], answers.labels[task]) < 0.91


def test_rates_are_those_of_a_shop(answers: Answers) -> None:
    assert 0.08 < answers.labels["view"].mean() < 0.15
    assert 0.007 < answers.labels["purchase"].mean() < 0.03


def test_labels_are_a_funnel(answers: Answers) -> None:
    view, favourite, cart, purchase = (answers.labels[task] > 0 for task in TASKS)
    assert (favourite <= view).all()
    assert (cart <= view).all()
    assert (purchase <= cart).all()
    np.testing.assert_array_equal(np.isnan(answers.labels["dwell"]), ~view)


def test_dwell_follows_its_mean(answers: Answers) -> None:
    device = [DEVICES[code] for code in answers.device]
    mean_BK = TRUTH.dwell(answers.histories, answers.now, device, answers.slate_BK)
    viewed = answers.labels["view"] > 0
    left = np.log(answers.labels["dwell"][viewed]) - mean_BK[viewed]
    assert abs(left.mean()) < 4 * 0.6 / len(left) ** 0.5
    assert left.std() == pytest.approx(0.6, rel=0.05)
    assert mean_BK.std() > 0.3


def test_every_sign_matters(answers: Answers) -> None:
    """A place further down, another device, a dearer item: each moves the law as it should."""
    first = Histories.of([events_of(answers.histories, b) for b in range(200)])
    items, now = answers.slate_BK[:200], answers.now[:200]

    def law_of(device: str, place: int) -> dict[str, NDArray]:
        at = np.full(items.shape, place)
        return TRUTH.probabilities(first, now, [device] * 200, items, at)

    top, lower = law_of("phone", 0), law_of("phone", 5)
    for task in TASKS:
        np.testing.assert_allclose(lower[task] / top[task], examined(np.array(5)))
    desk = law_of("desktop", 0)
    assert (desk["purchase"] / desk["cart"] > top["purchase"] / top["cart"]).all()
    assert desk["view"].mean() > 1.1 * top["view"].mean()
    price = SHOP.stock.price[items - 1]
    gain = np.log(desk["view"] / top["view"])
    assert np.corrcoef(np.log(price).ravel(), gain.ravel())[0, 1] > 0.5


def test_truth_reads_no_more_than_is_recent(answers: Answers) -> None:
    long = np.flatnonzero(answers.histories.lengths == RECENT)[:5]
    assert len(long) == 5
    slate_BK, now = answers.slate_BK[long], answers.now[long]
    cut = [events_of(answers.histories, b) for b in long]
    longer = [(np.r_[7, i], np.r_[1, k], np.r_[t[0] - HOUR, t]) for i, k, t in cut]
    device = ["tablet"] * len(long)
    laws = [
        TRUTH.probabilities(Histories.of(events), now, device, slate_BK, places(slate_BK))
        for events in (cut, longer)
    ]
    for task in TASKS:
        np.testing.assert_array_equal(laws[0][task], laws[1][task])


def test_chances_of_chosen_items_are_those_of_all(answers: Answers) -> None:
    truth = SHOP.truth()
    all_BN = truth.probabilities(answers.histories, answers.now)
    chosen_BM = truth.chances(answers.histories, answers.now, answers.pool_BM)
    direct_BM = np.take_along_axis(all_BN, answers.pool_BM - 1, axis=1)
    np.testing.assert_allclose(chosen_BM, direct_BM, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aisles", [1, 2, 3])
def test_chances_in_small_shops(aisles: int) -> None:
    shop = SyntheticShop(num_users=60, num_items=20, num_aisles=aisles, impressions=3_000)
    answers = joined(shop)
    all_BN = shop.truth().probabilities(answers.histories, answers.now)
    every_BN = np.broadcast_to(np.arange(1, 21), all_BN.shape)
    chosen_BN = shop.truth().chances(answers.histories, answers.now, every_BN)
    np.testing.assert_allclose(chosen_BN, all_BN, rtol=1e-9, atol=1e-12)


def newcomers(count: int) -> Histories:
    nothing = np.zeros(0, np.int64)
    return Histories.of([(nothing, nothing, nothing)] * count)


def test_newcomers_have_a_law_too(answers: Answers) -> None:
    slate_BK = answers.slate_BK[:3]
    asked = newcomers(3), answers.now[:3], ["phone"] * 3, slate_BK
    chances = TRUTH.probabilities(*asked, places(slate_BK))
    assert (chances["view"] > 0).all()
    all_BN = SHOP.truth().probabilities(newcomers(3), answers.now[:3])
    np.testing.assert_allclose(
        SHOP.truth().chances(newcomers(3), answers.now[:3], slate_BK),
        np.take_along_axis(all_BN, slate_BK - 1, axis=1),
    )


def test_no_item_is_worth_nothing(answers: Answers) -> None:
    slate_BK = answers.slate_BK[:4].copy()
    asked = newcomers(4), answers.now[:4], ["phone"] * 4
    whole = TRUTH.value(*asked, slate_BK, "view")
    slate_BK[:, 5:] = 0
    part = TRUTH.probabilities(*asked, slate_BK, places(slate_BK))
    assert (part["view"][:, 5:] == 0).all()
    np.testing.assert_allclose(TRUTH.value(*asked, slate_BK, "view"), part["view"].sum(1))
    assert (whole > part["view"].sum(1)).all()


def test_value_is_what_an_answer_brings(answers: Answers, law: dict[str, NDArray]) -> None:
    device = [DEVICES[code] for code in answers.device]
    value_B = TRUTH.value(answers.histories, answers.now, device, answers.slate_BK)
    np.testing.assert_allclose(value_B, law["purchase"].sum(1))
    bought_B = answers.labels["purchase"].sum(1)
    assert abs(bought_B.mean() - value_B.mean()) < 4 * bought_B.std() / len(bought_B) ** 0.5


def test_table_says_what_happened(tmp_path: Path, answers: Answers) -> None:
    SHOP.write(tmp_path)
    table = pq.read_table(tmp_path / "impressions.parquet")
    assert table.num_rows == answers.shown_BK.size
    row = table.slice(10, 1).to_pylist()[0]
    assert row["request_id"] == "answer-000000001"
    assert row["item_id"] == SHOP.stock.item_ids[answers.slate_BK[1, 0] - 1]
    assert row["user_id"] == f"user-{answers.users[1]:07d}"
    assert row["timestamp"] == answers.now[1]
    assert (row["position"], row["device"]) == (0, DEVICES[answers.device[1]])
    np.testing.assert_array_equal(table["view"], answers.labels["view"].ravel())
    np.testing.assert_allclose(table["propensity"], answers.propensity_BK.ravel(), rtol=1e-6)
    assert table["dwell"].null_count == int((answers.labels["view"] == 0).sum())


def test_shop_without_impressions_has_no_table(tmp_path: Path) -> None:
    replace(SHOP, num_users=20, impressions=0).write(tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == {"events", "items", "users"}


def test_read_gives_impressions(tmp_path: Path) -> None:
    ibis = pytest.importorskip("ibis")
    shop = replace(SHOP, num_users=50, impressions=1_000)
    tables = shop.read(ibis.duckdb.connect(), None, tmp_path / "with")
    assert tables.impressions is not None
    assert {"user_id", "position", "propensity", "device", *TASKS} <= set(
        tables.impressions.columns
    )
    without = replace(shop, impressions=0).read(ibis.duckdb.connect(), None, tmp_path / "without")
    assert without.impressions is None


def test_dataset_knows_the_law_of_its_answers(workspace: Workspace) -> None:
    """Prepared items, users and requests are counted otherwise; the law still tells the labels."""
    shop = replace(SHOP, num_users=200, impressions=10_000)
    source = {"_target_": "recsys.data.synthetic.SyntheticShop"} | vars(shop)
    dataset = prepare(
        {"name": "shop", "source": source}, shop, {"rule": "leave_one_out"}, workspace
    )
    law = answers_truth_of(dataset)
    assert law is not None
    assert truth_of(dataset) is not None
    shown = pq.read_table(dataset.path / "impressions.parquet").to_pydict()
    column = {name: np.array(values).reshape(-1, SLATE) for name, values in shown.items()}
    user, now = column["user"][:, 0], column["timestamp"][:, 0]
    times, first = dataset.events["times"], dataset.offsets
    own = (slice(first[u], first[u + 1]) for u in user)
    ends = [int((times[part] < at).sum()) for part, at in zip(own, now, strict=True)]
    asked = dataset.histories(user, np.array(ends)), now, column["device"][:, 0], column["item"]
    chances = law.probabilities(*asked, column["position"])
    assert column["item"].min() > 0
    for task in TASKS:
        spread = np.sqrt((chances[task] * (1 - chances[task])).sum())
        assert abs(column[task].sum() - chances[task].sum()) < 4 * spread
        assert auc(chances[task], column[task]) > 0.75


def test_dataset_without_answers_has_no_law_of_them(workspace: Workspace) -> None:
    shop = replace(SHOP, num_users=50, impressions=0)
    source = {"_target_": "recsys.data.synthetic.SyntheticShop"} | vars(shop)
    dataset = prepare(
        {"name": "shop", "source": source}, shop, {"rule": "leave_one_out"}, workspace
    )
    assert answers_truth_of(dataset) is None


def test_strange_questions_are_refused(answers: Answers) -> None:
    asked = newcomers(1), answers.now[:1]
    with pytest.raises(InputError, match="device 'watch': the shop knows phone, desktop, tablet"):
        TRUTH.value(*asked, ["watch"], answers.slate_BK[:1])
    with pytest.raises(InputError, match="task 'like'"):
        TRUTH.value(*asked, ["phone"], answers.slate_BK[:1], "like")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"impressions": -1}, "impressions is -1"),
        ({"impressions": 10, "num_items": 19, "num_aisles": 2}, "19 items are too few"),
    ],
)
def test_impossible_answers_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticShop(**settings)
