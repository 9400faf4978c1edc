"""The synthetic shop: the same every time, and its truth is what really happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from recsys.artifacts import Workspace
from recsys.data.prepare import prepare
from recsys.data.shop_stock import DAY, FIRST_DAY, HOUR
from recsys.data.synthetic import (
    CART,
    DRIFT,
    FAVOURITE,
    PURCHASE,
    VIEW,
    Block,
    SyntheticShop,
    truth_of,
)
from recsys.evaluation.protocol import evaluate
from recsys.history import Histories
from recsys.schema import InputError

SHOP = SyntheticShop(num_users=1_500, num_items=200, num_aisles=10, events_per_user=30, seed=3)


@pytest.fixture(scope="module")
def block() -> Block:
    (only,) = SHOP.blocks()
    return only


def without_last(block: Block) -> Histories:
    """Every user's events but the newest, items counted from 1 in the shop's own order."""
    kept = np.ones(len(block.rows), bool)
    kept[block.offsets[1:] - 1] = False
    columns = (block.rows[kept] + 1, block.kinds[kept], block.times[kept])
    return Histories(*columns, block.offsets - np.arange(len(block.offsets)))


Asked = tuple[Histories, NDArray, NDArray, NDArray]


def ask(shop: SyntheticShop, block: Block) -> Asked:
    """Histories, what came next (row), when, and how probable the truth finds every item."""
    last = block.offsets[1:] - 1
    histories, now = without_last(block), block.times[last]
    return histories, block.rows[last], now, shop.truth().probabilities(histories, now)


@pytest.fixture(scope="module")
def asked(block: Block) -> Asked:
    return ask(SHOP, block)


@pytest.fixture(scope="module", params=[0.0, 0.06, 0.46, 0.9], ids="alternate={}".format)
def law(request: pytest.FixtureRequest) -> Asked:
    """As `asked`, in shops where people keep two aisles at once more or less often."""
    shop = replace(SHOP, alternate=request.param)
    (block,) = shop.blocks()
    return ask(shop, block)


def ndcg(scores_BN: NDArray, target_B: NDArray) -> float:
    own = scores_BN[np.arange(len(target_B)), target_B][:, None]
    rank_B = (scores_BN > own).sum(1) + (scores_BN == own).sum(1) - 1
    return float(np.where(rank_B < 10, 1 / np.log2(rank_B + 2), 0).mean())


def owners(block: Block) -> NDArray:
    return np.repeat(np.arange(len(block.users)), np.diff(block.offsets))


@pytest.mark.parametrize("name", ["events", "items", "users"])
def test_same_settings_same_bytes(tmp_path: Path, name: str) -> None:
    small = replace(SHOP, num_users=100)
    files = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        small.write(tmp_path / place)
        files.append((tmp_path / place / f"{name}.parquet").read_bytes())
    assert files[0] == files[1]


def test_another_seed_is_another_shop(block: Block) -> None:
    (other,) = replace(SHOP, seed=4).blocks()
    assert other.times[0] != block.times[0]


def test_blocks_do_not_show_in_the_events(block: Block) -> None:
    parts = list(replace(SHOP, block_events=3_000).blocks())
    assert len(parts) == 15
    for name in ("users", "region", "rows", "kinds", "times", "values"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(block, name))


def test_more_users_do_not_change_the_first(block: Block) -> None:
    (fewer,) = replace(SHOP, num_users=10).blocks()
    np.testing.assert_array_equal(fewer.rows, block.rows[: block.offsets[10]])


def test_size_is_as_asked(block: Block) -> None:
    counts = np.diff(block.offsets)
    assert len(counts) == SHOP.num_users
    assert counts.min() >= 3
    assert counts.mean() == pytest.approx(SHOP.events_per_user, rel=0.1)
    inside = (block.times >= FIRST_DAY) & (block.times < FIRST_DAY + (SHOP.days + 5) * DAY)
    assert inside.all()


def test_times_rise_within_each_user(block: Block) -> None:
    same = np.diff(owners(block)) == 0
    assert np.diff(block.times)[same].min() >= 4_000


def test_every_act_follows_on_its_item(block: Block) -> None:
    act = np.flatnonzero(block.kinds > VIEW)
    assert (owners(block)[act] == owners(block)[act - 1]).all()
    assert (block.rows[act] == block.rows[act - 1]).all()
    steps = set(zip(block.kinds[act - 1].tolist(), block.kinds[act].tolist(), strict=True))
    assert steps == {(VIEW, FAVOURITE), (VIEW, CART), (FAVOURITE, CART), (CART, PURCHASE)}
    minutes = (block.times[act] - block.times[act - 1]) / 60_000
    assert 0.5 <= minutes.min() <= minutes.max() <= 18


def test_good_and_cheap_items_are_bought_more(block: Block) -> None:
    goods = SHOP.stock
    viewed, bought = (block.rows[block.kinds == kind] for kind in (VIEW, PURCHASE))
    assert goods.quality[bought].mean() > goods.quality[viewed].mean() + 0.2


def test_values_are_dwell_and_price(block: Block) -> None:
    views, bought = block.kinds == VIEW, block.kinds == PURCHASE
    assert (block.values[views] > 0).all()
    np.testing.assert_array_equal(block.values[bought], SHOP.stock.price[block.rows[bought]])
    assert np.isnan(block.values[~views & ~bought]).all()
    leads_on = np.flatnonzero(views[:-1] & (block.kinds[1:] > VIEW))
    assert block.values[leads_on].mean() > 2 * block.values[views].mean()


def test_newcomers_come_late(block: Block) -> None:
    first = (block.times[block.offsets[:-1]] - FIRST_DAY) / (SHOP.days * DAY)
    assert 0.1 < (first > 0.79).mean() < 0.2
    late = SHOP.stock.first_sale > FIRST_DAY
    assert 0.05 < late.mean() < 0.15
    assert np.isin(np.flatnonzero(late), block.rows).any()
    assert (block.times >= SHOP.stock.first_sale[block.rows]).all()


def test_interests_drift_to_neighbours(block: Block) -> None:
    same_user = np.diff(owners(block)) == 0
    hop = np.diff(SHOP.stock.aisle[block.rows])[same_user] % SHOP.num_aisles
    assert (hop == 0).mean() > 0.7
    moved = hop[hop != 0]
    assert np.isin(moved, [1, SHOP.num_aisles - 1]).mean() > 0.6


def test_usual_weight_of_the_aisle_before_changes_nothing() -> None:
    np.testing.assert_array_equal(SHOP.drift, DRIFT)
    (block,), (same,) = SHOP.blocks(), replace(SHOP, alternate=DRIFT[0, 1]).blocks()
    for one, other in zip(block, same, strict=True):
        np.testing.assert_array_equal(one, other)


def test_people_can_keep_two_aisles_at_once() -> None:
    shop = replace(SHOP, alternate=0.46)
    (block,) = shop.blocks()
    np.testing.assert_allclose(shop.drift.sum(1), 1)
    aisle = shop.stock.aisle[block.rows]
    same_user = (owners(block)[2:] == owners(block)[:-2]) & (block.kinds[2:] == VIEW)
    within = same_user & (np.diff(block.times)[1:] < HOUR) & (aisle[1:-1] != aisle[:-2])
    stays, back = aisle[2:] == aisle[1:-1], aisle[2:] == aisle[:-2]
    assert stays[within].mean() == pytest.approx(back[within].mean(), abs=0.06)
    assert (stays | back)[within].mean() > 0.9


def test_aisles_have_their_hours(block: Block) -> None:
    """Where people start a visit leans to the aisles whose hour it is."""
    goods = SHOP.stock
    hour = block.times // HOUR % 24
    returned = np.flatnonzero((np.diff(block.times) > HOUR) & (np.diff(owners(block)) == 0)) + 1
    tilt = goods.hour_tilt[goods.aisle[block.rows[returned]], hour[returned]]
    assert np.log(tilt).mean() > 0.1


def test_truth_sums_to_one(law: Asked) -> None:
    *_, probability_BN = law
    assert probability_BN.min() >= 0
    np.testing.assert_allclose(probability_BN.sum(1), 1, rtol=1e-9)


def test_what_happened_was_possible(law: Asked) -> None:
    _, target_B, _, probability_BN = law
    assert probability_BN[np.arange(len(target_B)), target_B].min() > 0


def test_truth_is_calibrated(law: Asked) -> None:
    """Of all items given probability p, a share p came next, in every range of p."""
    _, target_B, _, probability_BN = law
    happened = np.zeros_like(probability_BN)
    happened[np.arange(len(target_B)), target_B] = 1
    for low, high in [(0, 0.01), (0.01, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, 1.01)]:
        within = (probability_BN >= low) & (probability_BN < high)
        expected = probability_BN[within].sum()
        spread = np.sqrt((probability_BN * (1 - probability_BN))[within].sum())
        assert abs(happened[within].sum() - expected) < 4 * spread + 1, (low, high)


def test_truth_beats_what_can_be_counted(asked: Asked) -> None:
    histories, target_B, _, probability_BN = asked
    items = histories.items - 1
    same = np.diff(np.repeat(np.arange(len(histories)), histories.lengths)) == 0
    steps_NN = np.zeros((SHOP.num_items, SHOP.num_items))
    np.add.at(steps_NN, (items[:-1][same], items[1:][same]), 1)
    popularity_N = np.bincount(items, minlength=SHOP.num_items) / len(items)
    last_B = items[histories.offsets[1:] - 1]
    markov = ndcg(steps_NN[last_B] + popularity_N, target_B)
    popularity = ndcg(np.tile(popularity_N, (len(target_B), 1)), target_B)
    best = ndcg(probability_BN, target_B)
    assert popularity < markov / 2
    assert markov + 0.03 < best
    assert 0.4 < best < 0.65


def test_truth_is_the_same_for_one_as_for_many(asked: Asked) -> None:
    histories, _, now, probability_BN = asked
    for user in (0, 7, 500):
        part = slice(histories.offsets[user], histories.offsets[user + 1])
        columns = histories.items[part], histories.types[part], histories.times[part]
        alone = SHOP.truth().probabilities(Histories.of([columns]), now[user : user + 1])
        np.testing.assert_allclose(alone[0], probability_BN[user])


def test_truth_counts_items_as_the_dataset_does(asked: Asked) -> None:
    histories, _, now, probability_BN = asked
    order = np.random.default_rng(0).permutation(SHOP.num_items)
    truth = SHOP.truth([SHOP.stock.item_ids[row] for row in order])
    recounted = replace(histories, items=np.argsort(order)[histories.items - 1] + 1)
    np.testing.assert_allclose(truth.probabilities(recounted, now), probability_BN[:, order])


def test_newcomer_gets_popular_items_on_sale() -> None:
    nothing = np.zeros(0, np.int64)
    histories = Histories.of([(nothing, nothing, nothing)])
    (probability_N,) = SHOP.truth().probabilities(histories, np.array([FIRST_DAY]))
    assert probability_N.sum() == pytest.approx(1)
    assert (probability_N[SHOP.stock.first_sale > FIRST_DAY] == 0).all()


def test_long_look_means_that_the_item_is_wanted() -> None:
    path = (np.array([5]), np.array([VIEW]), np.array([FIRST_DAY]))
    seconds = np.array([10, 100, 600])
    chances = SHOP.truth().probabilities(Histories.of([path] * 3), FIRST_DAY + seconds * 1000)[:, 4]
    assert chances[0] < chances[1] < chances[2] == pytest.approx(1)


def test_path_that_changes_aisle_changes_the_answers() -> None:
    truth = SHOP.truth()
    first, second = truth.path("Garden tools", 4), truth.path("Fitness", 2)
    items = np.array([truth.item_ids.index(name) + 1 for name in first + second])
    times = FIRST_DAY + np.arange(6) * 20_000
    histories = Histories.of([(items, np.full(6, VIEW), times)])
    (probability_N,) = truth.probabilities(histories, times[-1:] + 10_000)
    answers = [truth.item_ids[column] for column in np.argsort(-probability_N)[:5]]
    assert {truth.aisle_of(name) for name in answers} == {"Fitness"}
    assert set(answers) <= set(truth.items_of("Fitness"))


def test_tables_read_as_people_speak(tmp_path: Path, block: Block) -> None:
    replace(SHOP, num_items=300, num_aisles=25).write(tmp_path)
    items = pq.read_table(tmp_path / "items.parquet").to_pylist()
    assert items[0]["category"] == "Garden tools"
    assert items[-1]["category"] == "Hiking 2"
    assert items[0]["title"].startswith(items[0]["brand"])
    assert len(items[0]["vector"]) == 16
    events = pq.read_table(tmp_path / "events.parquet").slice(0, 1).to_pylist()
    assert events[0]["user_id"] == "user-0000000"
    assert events[0]["event_type"] == "view"


def test_vectors_lie_by_aisle() -> None:
    table = SHOP.stock.table()
    vector_ND = np.array(table["vector"].to_pylist())
    distance_NN = ((vector_ND[:, None] - vector_ND[None]) ** 2).sum(-1)
    np.fill_diagonal(distance_NN, np.inf)
    nearest = distance_NN.argmin(1)
    assert (SHOP.stock.aisle[nearest] == SHOP.stock.aisle).mean() > 0.99


def test_read_gives_typed_tables(tmp_path: Path) -> None:
    ibis = pytest.importorskip("ibis")
    shop = replace(SHOP, num_users=50)
    in_blocks = replace(shop, block_events=300)
    tables = in_blocks.read(ibis.duckdb.connect(), None, tmp_path)
    (block,) = shop.blocks()
    events = tables.events.to_pyarrow()
    assert tables.has_time
    assert events.num_rows == len(block.rows)
    assert set(events.column_names) == {"user_id", "item_id", "timestamp", "event_type", "value"}
    assert events["user_id"].to_pylist() == [f"user-{u:07d}" for u in owners(block)]
    assert events["timestamp"].to_pylist() == block.times.tolist()
    assert events["value"].null_count == int(np.isnan(block.values).sum())
    assert tables.items.count().to_pyarrow().as_py() == SHOP.num_items


def test_dataset_knows_its_truth(workspace: Workspace) -> None:
    """Prepared items are counted otherwise than the shop's; the truth ranks as well as before."""
    shop = replace(SHOP, num_users=300)
    source = {"_target_": "recsys.data.synthetic.SyntheticShop"} | vars(shop)
    split = {"rule": "leave_one_out"}
    dataset = prepare({"name": "shop", "source": source}, shop, split, workspace)
    truth = truth_of(dataset)
    assert truth is not None
    (block,) = shop.blocks()
    last = block.offsets[1:] - 1
    direct_BN = shop.truth().probabilities(without_last(block), block.times[last])
    best = evaluate(dataset, truth, "test", exclude_seen=False, details=False)
    assert best.metrics["ndcg@10"] == pytest.approx(ndcg(direct_BN, block.rows[last]), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_users": 0}, "num_users is 0"),
        ({"num_items": 5, "num_aisles": 9}, "5 items cannot fill 9 aisles"),
        ({"follow": 1.5}, "follow is 1.5"),
        ({"alternate": 0.95}, "alternate is 0.95; expected 0 to 0.9"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_shops_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SyntheticShop(**settings)


def test_path_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="makes its own events"):
        SHOP.read(None, tmp_path, tmp_path)  # type: ignore[arg-type]


def test_items_of_another_shop_are_refused() -> None:
    with pytest.raises(InputError, match="'B0001' is not sold"):
        SHOP.truth(["B0001"])
    with pytest.raises(InputError, match="no aisle 'Fish'"):
        SHOP.truth().items_of("Fish")


@pytest.mark.parametrize("aisles", [1, 2, 3])
def test_small_shops_have_a_truth_too(aisles: int) -> None:
    shop = SyntheticShop(num_users=200, num_items=max(3, aisles), num_aisles=aisles)
    (block,) = shop.blocks()
    last = block.offsets[1:] - 1
    probability_BN = shop.truth().probabilities(without_last(block), block.times[last])
    np.testing.assert_allclose(probability_BN.sum(1), 1, rtol=1e-9)
    assert probability_BN[np.arange(len(last)), block.rows[last]].min() > 0
