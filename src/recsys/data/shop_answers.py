"""What the synthetic shop shows, and what people do with it, by a law that is known.

An experiment of its own beside the log: at moments within a user's log the shop answers, the
person looks the answer over, and the log goes on as if nothing had been shown. So nothing of what
is done here is in a history, and the labels are a law of what can be known when answering.

1. A moment: soon after an event, or just before the first event of the next visit.
2. A pool of `POOL` items, as a retriever would find: the last one seen, draws of the next-event
   law, popular ones of any aisle, random ones; put into a base order by a noisy score.
3. The pool's places are paired at random, and each pair changes places with chance `EXPLORE`; the
   first `SLATE` places are shown. So place j shows base item j with chance 1 - EXPLORE, or else any
   other of the pool, each as likely, and no item twice: `propensity` is exact, place by place.
4. Each shown item is viewed or not, whatever else is shown: `AnswersTruth`. A viewed one is put
   among the favourites or not, into the cart or not, from there bought or not; `dwell` is the
   seconds of the view.

Shapes: B requests, C items of each, K places shown, M items of the pool, A aisles, E events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from recsys.data.shop_stock import HOUR
from recsys.data.synthetic import (
    Block,
    Bools,
    Floats,
    Ints,
    ShopTruth,
    Standing,
    SyntheticShop,
    choose,
    coded,
    popular,
    stream_of,
    throw,
    truth_of,
    user_ids,
)
from recsys.history import Histories
from recsys.schema import InputError

if TYPE_CHECKING:
    from recsys.data.dataset import Dataset

SLATE, POOL = 10, 50
EXPLORE = 0.2
"""Chance that a place shows another item of the pool than the base order has there."""
RECENT = 50
"""Newest events of a history that the law reads: no more than a ranker does."""
SOON = 256_000
"""Milliseconds after an event within which an answer is asked for, but for the next visit's."""
JUST_BEFORE = 2_000
TOGETHER = 4_096
"""Requests answered at a time, to bound memory; no effect on what they are."""

TASKS = ("view", "favourite", "cart", "purchase")
DEVICES = ("phone", "desktop", "tablet")
DEVICE_SHARES = np.array([0.6, 0.3, 0.1])
DEVICE_VIEW = np.array([0.0, 0.35, -0.35])
"""By device: how much more is looked at."""
DEVICE_DEAR = np.array([-0.5, 0.3, 0.0])
"""By device: how much more dear things are looked at."""
DEVICE_BUY = np.array([-0.4, 0.6, 0.0])
"""By device: how much more of a cart is bought."""
FADE = 0.2
"""Place j is examined with chance 1 / (1 + FADE * j)."""
NOISE, TINY = 0.7, 1e-12
"""How noisy the base order is."""
NEXT, SCALE, FLOOR = 0.6, 500, 0.1
"""Weight of log(P * SCALE + FLOOR), P by the next-event law; what cannot come next has a bound."""
FAR = 4.0
"""The squared log ratio to the usual price counts up to this."""
DWELL_SPREAD = 0.6
DRAWN, POPULAR, RANDOM = 30, 20, 2 * POOL
"""Proposals of each kind for the pool; the random ones are distinct: they always fill it."""

DICE = {
    "asked": 1,
    "when": 1,
    "device": 1,
    "start": 1,
    **dict.fromkeys(("aisle", "step", "follow", "item"), DRAWN),
    **dict.fromkeys(("popular aisle", "popular item"), POPULAR),
    **dict.fromkeys(("noise", "pair", "swap"), POOL),
    **dict.fromkeys((*TASKS, "dwell", "dwell again"), SLATE),
}
"""What is drawn at each moment, and how many of it: each has its own numbers."""
FIRST_DIE = dict(zip(DICE, np.cumsum([0, *DICE.values()]).tolist(), strict=False))
APART = np.uint64(0xA5A5A5A5A5A5A5A5)
"""Keeps these dice apart from those of the log."""


class Moments(NamedTuple):
    """When answers are asked for: users (rows of the block) and places, events before [B].

    last, gaps [B]: when the newest of those events was, and how long the next one took after it, in
    milliseconds (`SOON` where there is none); streams [B]: where each moment's dice begin.
    """

    users: Ints
    places: Ints
    last: Ints
    gaps: Ints
    streams: NDArray[Any]

    def draw(self, name: str) -> Floats:
        """Return this name's uniform numbers: [B, D]."""
        places = np.arange(DICE[name], dtype=np.uint64) + np.uint64(FIRST_DIE[name] + 1)
        return throw(self.streams[:, None], places)

    def kept(self, chosen: Bools | slice) -> Moments:
        """Return some of them."""
        return Moments(*(column[chosen] for column in self))

    @property
    def now(self) -> Ints:
        """When each is: int64 [B], after the last event and before the next one."""
        soon = 1 + self.draw("when")[:, 0] * (np.minimum(self.gaps, SOON) - 1)
        return self.last + np.where(
            self.gaps < HOUR, soon.astype(np.int64), self.gaps - JUST_BEFORE
        )


class Answers(NamedTuple):
    """Some answers and what people did: B requests, K places, a pool of M items.

    users [B]: their numbers; histories, now [B], device [B] (places in `DEVICES`): what was known;
    pool_BM: items, counted from 1, in the base order; shown_BK: which of the pool each place
    shows; propensity_BK: the chance of that; labels: task → 0 or 1 [B, K], and `dwell`, seconds of
    the view or NaN.
    """

    users: Ints
    histories: Histories
    now: Ints
    device: Ints
    pool_BM: Ints
    shown_BK: Ints
    propensity_BK: Floats
    labels: dict[str, Floats]

    @property
    def slate_BK(self) -> Ints:
        """The items shown."""
        return np.take_along_axis(self.pool_BM, self.shown_BK, axis=1)


@dataclass(frozen=True)
class Signs:
    """What the law reads of each item before a user: float64 [B, C], and device [B].

    next: log of the next-event law; desire: less a half; far: squared log ratio to the mean price
    of the path; dear: log price less the shop's mean; seen: log of 1 + events in its aisle.
    """

    device: Ints
    next: Floats
    desire: Floats
    far: Floats
    dear: Floats
    seen: Floats

    def chosen(self, places_BK: Ints) -> Signs:
        """Return those of some of the items."""
        columns = (self.next, self.desire, self.far, self.dear, self.seen)
        signs = (np.take_along_axis(column, places_BK, axis=1) for column in columns)
        return Signs(self.device, *signs)

    def view(self) -> Floats:
        """Return the chance that an examined item is viewed."""
        device_B1 = self.device[:, None]
        wish = NEXT * self.next + 3.0 * self.desire - 0.4 * self.far + DEVICE_VIEW[device_B1]
        return _sigmoid(-2.9 + wish + DEVICE_DEAR[device_B1] * self.dear)

    def favourite(self) -> Floats:
        """Return the chance of a favourite, once viewed."""
        return _sigmoid(-2.8 + 4.0 * self.desire + 0.5 * self.seen)

    def cart(self) -> Floats:
        """Return the chance of a cart, once viewed."""
        return _sigmoid(-2.6 + 3.5 * self.desire + 0.4 * self.seen - 0.3 * self.far)

    def purchase(self) -> Floats:
        """Return the chance of a purchase, once in the cart."""
        device_B1 = self.device[:, None]
        return _sigmoid(-1.5 + 3.0 * self.desire + 0.3 * self.seen + DEVICE_BUY[device_B1])

    def dwell(self) -> Floats:
        """Return the mean of the logarithm of a view's seconds."""
        return 2.5 + 2.0 * self.desire + 0.2 * self.seen


class AnswersTruth:
    """The exact law of what people do with shown items, counted as a dataset counts them.

    Only the newest `RECENT` events, the item table, the device and the place matter.

    >>> shop = SyntheticShop(num_users=9, num_items=40, num_aisles=4)
    >>> truth = AnswersTruth(shop.truth())
    >>> path = Histories.of([(np.array([3]), np.array([1]), np.array([1_767_225_600_000]))])
    >>> asked = path, path.times + 5_000, ["phone"]
    >>> chances = truth.probabilities(*asked, np.array([[4, 30]]), np.array([[0, 1]]))
    >>> bool(chances["view"][0, 0] > 3 * chances["view"][0, 1])
    True
    """

    name = "best achievable"

    def __init__(self, truth: ShopTruth) -> None:
        self.truth, self.goods = truth, truth.shop.stock

    def probabilities(
        self,
        histories: Histories,
        now: Ints,
        device: ArrayLike,
        items_BC: Ints,
        positions_BC: Ints,
    ) -> dict[str, Floats]:
        """Return each task's probability for shown items: task → float64 [B, C].

        now: int64 [B], milliseconds; device [B]: names of `DEVICES`; items_BC: 1 and up, 0 is no
        item and has probability 0; positions_BC: where each is shown, 0 first. Raises InputError
        for another device.
        """
        signs = self.signs(histories, now, device_codes(device), items_BC)
        return funnel(signs, positions_BC, items_BC > 0)

    def dwell(self, histories: Histories, now: Ints, device: ArrayLike, items_BC: Ints) -> Floats:
        """Return the mean of the logarithm of a view's seconds: float64 [B, C]."""
        return self.signs(histories, now, device_codes(device), items_BC).dwell()

    def value(
        self,
        histories: Histories,
        now: Ints,
        device: ArrayLike,
        slate_BK: Ints,
        task: str = "purchase",
    ) -> Floats:
        """Return how many of a task an answer brings on average: float64 [B].

        slate_BK: items in the order shown; 0 is an empty place. Raises InputError for no such task.
        """
        if task not in TASKS:
            raise InputError(f"task {task!r}: the shop's answers know {', '.join(TASKS)}")
        places_BK = np.broadcast_to(np.arange(slate_BK.shape[1]), slate_BK.shape)
        return self.probabilities(histories, now, device, slate_BK, places_BK)[task].sum(1)

    def signs(self, histories: Histories, now: Ints, device: Ints, items_BC: Ints) -> Signs:
        """Return what the law reads, for devices as places in `DEVICES`."""
        recent = histories.last(RECENT)
        rows_BC = self.truth.rows[items_BC - 1]
        chance_BC = self.truth.chances(recent, now, items_BC)
        price = np.log(self.goods.price)
        return Signs(
            next=np.log(chance_BC * SCALE + FLOOR),
            desire=self.goods.desire[rows_BC] - 0.5,
            far=self._far(recent, rows_BC),
            dear=(price - price.mean())[rows_BC],
            seen=np.log1p(self._seen(recent, rows_BC)),
            device=device,
        )

    def _far(self, recent: Histories, rows_BC: Ints) -> Floats:
        paid = self.goods.price[self.truth.rows[recent.items - 1]]
        total_B = np.bincount(_owners(recent), paid, minlength=len(recent))
        some_B = recent.lengths > 0
        usual_B = np.divide(total_B, recent.lengths, out=np.ones(len(recent)), where=some_B)
        ratio_BC = np.log(self.goods.price[rows_BC] / usual_B[:, None])
        return np.minimum(ratio_BC**2, FAR) * some_B[:, None]

    def _seen(self, recent: Histories, rows_BC: Ints) -> Floats:
        aisles = self.goods.aisle[self.truth.rows[recent.items - 1]]
        size = len(recent) * self.goods.num_aisles
        count = np.bincount(_owners(recent) * self.goods.num_aisles + aisles, minlength=size)
        first_B1 = np.arange(len(recent))[:, None] * self.goods.num_aisles
        return count[first_B1 + self.goods.aisle[rows_BC]].astype(np.float64)


def funnel(signs: Signs, positions_BC: Ints, there_BC: Bools) -> dict[str, Floats]:
    """Return each task's probability at these places; 0 where nothing is there."""
    view = signs.view() * examined(positions_BC) * there_BC
    cart = view * signs.cart()
    chances = (view, view * signs.favourite(), cart, cart * signs.purchase())
    return dict(zip(TASKS, chances, strict=True))


def examined(positions: Ints) -> Floats:
    """Return the chance that a place is looked at.

    >>> examined(np.array([0, 5])).tolist()
    [1.0, 0.5]
    """
    return 1 / (1 + FADE * positions)


def device_codes(device: ArrayLike) -> Ints:
    """Return each device's place in `DEVICES`: int64 [B]; InputError for a strange one.

    >>> device_codes(["tablet", "phone"])
    array([2, 0])
    """
    names = [str(name) for name in np.asarray(device, object)]
    strange = sorted(set(names) - set(DEVICES))
    if strange:
        raise InputError(f"device {strange[0]!r}: the shop knows {', '.join(DEVICES)}")
    return np.array([DEVICES.index(name) for name in names], np.int64)


def answers_truth_of(dataset: Dataset) -> AnswersTruth | None:
    """Return the law of the answers in a dataset; None where it is not the shop's or has none."""
    truth = truth_of(dataset)
    return AnswersTruth(truth) if truth is not None and truth.shop.impressions else None


@dataclass(frozen=True)
class ShopAnswers:
    """The answers of a shop with `impressions` set: the same for the same settings.

    >>> shop = SyntheticShop(num_users=50, num_items=100, num_aisles=5, impressions=1_000)
    >>> answers = next(ShopAnswers(shop).batches())
    >>> answers.pool_BM.shape[1], answers.slate_BK.shape[1]
    (50, 10)
    """

    shop: SyntheticShop

    @cached_property
    def truth(self) -> AnswersTruth:
        """Their law, for items counted in the shop's own order."""
        return AnswersTruth(self.shop.truth())

    @property
    def pool_size(self) -> int:
        """Items of each pool, M: even, as they are paired."""
        return min(POOL, len(self.shop.stock)) // 2 * 2

    def write(self, path: Path) -> None:
        """Write the shown items as Parquet, a row each, with `request_id` counted through."""
        first = 0
        with pq.ParquetWriter(path, IMPRESSIONS) as out:
            for answers in self.batches():
                out.write_table(_table(answers, first, self.shop.stock.item_ids))
                first += len(answers.now)

    def batches(self) -> Iterator[Answers]:
        """Answer at all moments, some thousand at a time."""
        for block in self.shop.blocks():
            moments = self._moments(block)
            for start in range(0, len(moments.users), TOGETHER):
                yield self._answer(block, moments.kept(slice(start, start + TOGETHER)))

    def _moments(self, block: Block) -> Moments:
        """Choose among a block's events those to ask after: fewer are always some of more."""
        events = _events(block)
        share = self.shop.impressions / SLATE / (self.shop.num_users * self.shop.events_per_user)
        users = stream_of(self.shop.seed, block.users)[events.users] ^ APART
        rounds = []
        for again in range(int(np.ceil(share))):
            every = events._replace(streams=users ^ stream_of(again, events.places))
            rounds.append(every.kept(every.draw("asked")[:, 0] < share - again))
        return Moments(*(np.concatenate(column) for column in zip(*rounds, strict=True)))

    def _answer(self, block: Block, moments: Moments) -> Answers:
        histories, now = _histories(block, moments), moments.now
        device = np.searchsorted(np.cumsum(DEVICE_SHARES), moments.draw("device")[:, 0], "right")
        pool_BM = self._pool(moments, histories, now)
        signs = self.truth.signs(histories, now, device, pool_BM)
        order_BM = np.argsort(-_base_score(signs, moments), axis=1, kind="stable")
        shown_BK, propensity_BK = _explored(moments, self.pool_size)
        labels = _labels(signs.chosen(np.take_along_axis(order_BM, shown_BK, axis=1)), moments)
        pool_BM = np.take_along_axis(pool_BM, order_BM, axis=1)
        users = block.users[moments.users]
        return Answers(users, histories, now, device, pool_BM, shown_BK, propensity_BK, labels)

    def _pool(self, moments: Moments, histories: Histories, now: Ints) -> Ints:
        """Return the first distinct items on sale among all proposals, counted from 1: [B, M]."""
        goods = self.shop.stock
        stand = self.truth.truth.standing(histories, histories.lengths > 0)
        parts = stand.row[:, None], self._drawn(stand, now, moments), self._other(now, moments)
        rows_BP = np.concatenate(parts, axis=1)
        last = _is_repeated(rows_BP) * 2 + (goods.first_sale[rows_BP] > now[:, None])
        kept_BM = np.argsort(last, axis=1, kind="stable")[:, : self.pool_size]
        return np.take_along_axis(rows_BP, kept_BM, axis=1) + 1

    def _drawn(self, stand: Standing, now: Ints, moments: Moments) -> Ints:
        """Draw rows by the law of the next event, where that is no act: [B, DRAWN]."""
        shape = (len(now), DRAWN)
        stand = Standing(*(np.repeat(column, DRAWN) for column in stand))
        now = np.repeat(now, DRAWN)
        leaves = now - stand.time >= HOUR
        drawn = choose(self.shop, stand, now, leaves, lambda name: moments.draw(name).ravel())
        return drawn.reshape(shape)

    def _other(self, now: Ints, moments: Moments) -> Ints:
        """Draw popular rows of any aisle, then distinct random ones: [B, POPULAR + RANDOM]."""
        goods = self.shop.stock
        aisle_BP = (moments.draw("popular aisle") * goods.num_aisles).astype(np.int64)
        popular_BP = popular(goods, aisle_BP, now[:, None], moments.draw("popular item"))
        start_B1 = (moments.draw("start") * len(goods)).astype(np.int64)
        steps = np.arange(min(RANDOM, len(goods))) * _stride(len(goods))
        return np.concatenate([popular_BP, (start_B1 + steps) % len(goods)], axis=1)


def _events(block: Block) -> Moments:
    """Return every event of a block as a moment after it, with no dice yet."""
    counts = np.diff(block.offsets)
    users = np.repeat(np.arange(len(counts)), counts)
    gaps = np.diff(block.times, append=0)
    gaps[block.offsets[1:] - 1] = SOON
    places = np.arange(1, len(users) + 1) - block.offsets[users]
    return Moments(users, places, block.times, gaps, np.zeros(len(users), np.uint64))


def _histories(block: Block, moments: Moments) -> Histories:
    """Return the newest `RECENT` events before each moment, items counted from 1."""
    counts = np.minimum(moments.places, RECENT)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    firsts = block.offsets[moments.users] + moments.places - counts
    source = np.repeat(firsts - offsets[:-1], counts) + np.arange(offsets[-1])
    return Histories(block.rows[source] + 1, block.kinds[source], block.times[source], offsets)


def _stride(size: int) -> int:
    """Return a step that meets each of `size` rows once, far from the one before."""
    near = int(size * 0.618)
    return next(step for step in range(max(near, 1), size + 1) if gcd(step, size) == 1)


def _is_repeated(rows_BP: Ints) -> Bools:
    """Tell which rows were there before in the same request."""
    order_BP = np.argsort(rows_BP, axis=1, kind="stable")
    sorted_BP = np.take_along_axis(rows_BP, order_BP, axis=1)
    repeated_BP = np.zeros(rows_BP.shape, bool)
    np.put_along_axis(repeated_BP, order_BP[:, 1:], sorted_BP[:, 1:] == sorted_BP[:, :-1], axis=1)
    return repeated_BP


def _base_score(signs: Signs, moments: Moments) -> Floats:
    """Return the shop's own score of its pool: part of the truth, and logistic noise."""
    noise = moments.draw("noise")[:, : signs.next.shape[1]]
    return 0.4 * signs.next + signs.desire + NOISE * (np.log(noise + TINY) - np.log1p(-noise))


def _explored(moments: Moments, size: int) -> tuple[Ints, Floats]:
    """Return which place of the base order each place shows, and how probable that was: [B, K].

    The pairs are a uniformly random matching: a place that changes is as likely to be with any
    other. So the chance of each (place, item) is exact without its neighbours'.
    """
    paired_BM = np.argsort(moments.draw("pair")[:, :size], axis=1, kind="stable")
    changes = np.repeat(moments.draw("swap")[:, : size // 2] < EXPLORE, 2, axis=1)
    partner_BM = paired_BM.reshape(len(paired_BM), -1, 2)[:, :, ::-1].reshape(paired_BM.shape)
    shown_BM = np.empty_like(paired_BM)
    np.put_along_axis(shown_BM, paired_BM, np.where(changes, partner_BM, paired_BM), axis=1)
    shown_BK = shown_BM[:, :SLATE]
    stays = shown_BK == np.arange(SLATE)
    return shown_BK, np.where(stays, 1 - EXPLORE, EXPLORE / (size - 1))


def _labels(signs: Signs, moments: Moments) -> dict[str, Floats]:
    """Draw what people do with shown items: task → 0 or 1 [B, K], and `dwell`."""
    chance_BK = signs.view() * examined(np.arange(SLATE))
    view = moments.draw("view") < chance_BK
    favourite = view & (moments.draw("favourite") < signs.favourite())
    cart = view & (moments.draw("cart") < signs.cart())
    purchase = cart & (moments.draw("purchase") < signs.purchase())
    funnel = (done.astype(np.float64) for done in (view, favourite, cart, purchase))
    dwell = np.where(view, np.exp(signs.dwell() + DWELL_SPREAD * _normal(moments)), np.nan)
    return dict(zip(TASKS, funnel, strict=True)) | {"dwell": dwell}


def _normal(moments: Moments) -> Floats:
    """Draw normal numbers (Box and Muller 1958): [B, K]."""
    radius = np.sqrt(-2 * np.log1p(-moments.draw("dwell")))
    return radius * np.cos(2 * np.pi * moments.draw("dwell again"))


def _owners(histories: Histories) -> Ints:
    return np.repeat(np.arange(len(histories)), histories.lengths)


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


IMPRESSIONS = pa.schema(
    {
        "request_id": pa.string(),
        "user_id": pa.dictionary(pa.int32(), pa.string()),
        "item_id": pa.dictionary(pa.int32(), pa.string()),
        "timestamp": pa.int64(),
        "position": pa.int32(),
        "propensity": pa.float32(),
        "device": pa.dictionary(pa.int32(), pa.string()),
        **dict.fromkeys(TASKS, pa.int8()),
        "dwell": pa.float32(),
    }
)


def _table(answers: Answers, first: int, item_ids: list[str]) -> pa.Table:
    """Return a row a shown item, requests counted from `first`."""
    requests, places = len(answers.now), answers.shown_BK.shape[1]
    names, owners = np.unique(answers.users, return_inverse=True)
    columns = {
        "request_id": np.repeat([f"answer-{first + n:09d}" for n in range(requests)], places),
        "user_id": coded(np.repeat(owners, places), user_ids(names)),
        "item_id": coded(answers.slate_BK.ravel() - 1, item_ids),
        "timestamp": np.repeat(answers.now, places),
        "position": np.tile(np.arange(places), requests),
        "propensity": answers.propensity_BK.ravel(),
        "device": coded(np.repeat(answers.device, places), list(DEVICES)),
        **{task: answers.labels[task].ravel() for task in TASKS},
        "dwell": pa.array(answers.labels["dwell"].ravel(), from_pandas=True),
    }
    return pa.table([_cast(columns[field.name], field.type) for field in IMPRESSIONS], IMPRESSIONS)


def _cast(column: Any, kind: pa.DataType) -> pa.Array:
    return column if isinstance(column, pa.DictionaryArray) else pa.array(column).cast(kind)
