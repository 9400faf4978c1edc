"""A seeded shop of any size that knows how probable every next event was.

One step of a user, drawn in this order, so that each part is known given what came before it:

1. The last item is wanted still: the user puts it among the favourites, into the cart, or buys it
   (`ACT_CHANCE` by what was done with it, times its desire: quality against price).
2. Otherwise the user leaves (`LEAVE_CHANCE`) and comes back hours or days later, or looks on.
3. The time passes. A look that leads to an act took longer: its gap says something about what
   follows. Both kinds of gap are log-uniform between powers of two, as `history.gap_bucket` cuts.
4. An aisle: this one, the one visited before it (within a visit with weight `alternate`: near half
   of the whole, people keep two aisles at once), or a neighbour of this one (`DRIFT`), tilted by
   each aisle's hours and season.
5. An item of that aisle: where the user has been there lately, with chance `follow` one of the next
   few items along the aisle after the last one seen there (after more than a view: from the far
   side of the aisle, the things that go with it); otherwise by popularity among those on sale.

Nothing is hidden: the state is the last event and the last one in the aisle before, both in the
history. The user's number of events is drawn beforehand, so being last says nothing either.

What people are shown meanwhile, and do with it, is an experiment of its own: `shop_answers`.

Shapes: U users of a block, E events, A aisles, N items, B histories, C chosen items, K candidate
aisles, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.artifacts import writing
from recsys.data.shop_stock import DAY, FIRST_DAY, HOUR, Stock
from recsys.history import Histories
from recsys.schema import EVENT_TYPES, InputError

if TYPE_CHECKING:
    import ibis
    from torch import Tensor

    from recsys.data.dataset import Dataset
    from recsys.data.sources import Tables

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

VIEW, FAVOURITE, CART, PURCHASE = range(1, 5)
ACT_CHANCE = np.array([0.0, 0.25, 0.35, 0.5, 0.0])
"""Chance that an event of each type is followed by an act on its item, at full desire."""
SKIP_FAVOURITE = 0.5
"""Share of wanted items that go from the view straight into the cart."""
LEAVE_CHANCE = 0.2
LOOK_SECONDS, ACT_SECONDS = (4, 256), (32, 1024)
NEXT_STEPS = np.array([0.45, 0.3, 0.25])
"""Chances of the next, second next and third next item along the aisle."""
DRIFT = np.array([[0.86, 0.06, 0.04, 0.04], [0.4, 0.3, 0.15, 0.15]])
"""Weights of this aisle, the one before, and both neighbours: in a visit, and at the next visit."""
LATE_USERS = 0.15
"""Share of users who first come in the last fifth of the log."""
BUSY_HOURS = np.cumsum(1.2 + np.cos(2 * np.pi * (np.arange(24) - 19) / 24))
REGIONS = ("north", "east", "south", "west")
STEP_DICE = ("act", "leave", "gap", "clock", "aisle", "item", "follow", "step", "skip", "dwell")
USER_DICE = ("late", "count", "count again", "region", "at home")
DICE = STEP_DICE + USER_DICE
"""What is drawn at each step, and once for each user: each draw has its own number."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
EVERYONE = slice(None)
LIMITS = {"follow": (1.0, 0.45), "alternate": (0.9, 0.06)}
"""The largest value of each share, and its usual one."""
LEAST_ITEMS = 20
"""Items that answers are drawn from, at least."""
SIZES = ("num_users", "num_items", "num_aisles", "events_per_user", "days", "block_events")


@dataclass(frozen=True)
class SyntheticShop:
    """A source that makes its own events: the same for the same settings, byte for byte.

    num_users, num_items, num_aisles: sizes; events_per_user: mean; days: length of the log; follow:
    chance of going on along an aisle, against picking by popularity; alternate: weight of the aisle
    visited before, within a visit (0.46: as likely as this one); block_events: about how many are
    in memory at a time, with no effect on what they are; impressions: about how many items are
    shown in answers beside the log (0: none, and no table of them).

    >>> shop = SyntheticShop(num_users=50, num_items=100, num_aisles=5)
    >>> shop.truth().aisle_of("item-000060")
    'Camping'
    """

    num_users: int = 4_000
    num_items: int = 500
    num_aisles: int = 20
    events_per_user: int = 40
    days: int = 90
    follow: float = 0.45
    alternate: float = 0.06
    seed: int = 0
    block_events: int = 2_000_000
    impressions: int = 0

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise InputError(
                    f"synthetic shop: {name} is {getattr(self, name)}; expected 1 or more: set "
                    f"data.source.{name}=100"
                )
        if self.num_items < self.num_aisles:
            raise InputError(
                f"synthetic shop: {self.num_items} items cannot fill {self.num_aisles} aisles; set "
                f"data.source.num_aisles={self.num_items} or less"
            )
        if self.seed < 0:
            raise InputError(
                f"synthetic shop: seed is {self.seed}; expected 0 or more: set data.source.seed=0"
            )
        for name, (most, usual) in LIMITS.items():
            if not 0 <= getattr(self, name) <= most:
                raise InputError(
                    f"synthetic shop: {name} is {getattr(self, name)}; expected 0 to {most:g}: set "
                    f"data.source.{name}={usual}"
                )
        self._check_impressions()

    def _check_impressions(self) -> None:
        if self.impressions < 0:
            raise InputError(
                f"synthetic shop: impressions is {self.impressions}; expected 0 (none) or more: "
                "set data.source.impressions=100000"
            )
        if self.impressions and self.num_items < LEAST_ITEMS:
            raise InputError(
                f"synthetic shop: {self.num_items} items are too few to choose answers from; set "
                f"data.source.num_items={LEAST_ITEMS} or more, or data.source.impressions=0"
            )

    @cached_property
    def stock(self) -> Stock:
        """What this shop sells, with the same settings always the same."""
        return Stock.fill(self.num_items, self.num_aisles, self.days, self.seed)

    @cached_property
    def drift(self) -> Floats:
        """`DRIFT` with this shop's weight of the aisle before, taken from that of this aisle."""
        here, before, *sides = DRIFT[0]
        more = self.alternate - before
        return np.array([[here - more, before + more, *sides], DRIFT[1]])

    def truth(self, item_ids: Sequence[str] | None = None) -> ShopTruth:
        """Return what is known of this shop, for items counted as in `item_ids` (item 1 first)."""
        return ShopTruth(self, list(self.stock.item_ids if item_ids is None else item_ids))

    def read(self, con: ibis.BaseBackend, path: Path | None, scratch: Path) -> Tables:
        """Write the shop's tables below `scratch` and return them."""
        from recsys.data.sources import Tables

        if path is not None:
            raise InputError(
                f"synthetic shop: data.path is {path}, but the shop makes its own events; "
                "leave data.path out"
            )
        with writing(scratch / "shop") as folder:
            self.write(folder)
        tables = {
            file.stem: con.read_parquet(file)
            for file in sorted((scratch / "shop").glob("*.parquet"))
        }
        return Tables(**tables, has_time=True)

    def write(self, folder: Path) -> None:
        """Write `events`, `items` and `users` as Parquet, a block of users at a time.

        And `impressions`, where there are any.
        """
        pq.write_table(self.stock.table(), folder / "items.parquet")
        events, users = folder / "events.parquet", folder / "users.parquet"
        with pq.ParquetWriter(events, EVENTS) as events_out, pq.ParquetWriter(users, USERS) as out:
            for block in self.blocks():
                events_out.write_table(_event_table(block, self.stock))
                out.write_table(_user_table(block))
        if self.impressions:
            from recsys.data.shop_answers import ShopAnswers

            ShopAnswers(self).write(folder / "impressions.parquet")

    def blocks(self) -> Iterator[Block]:
        """Walk all users through the shop, as many at a time as make `block_events`."""
        together = max(1, self.block_events // self.events_per_user)
        for first in range(0, self.num_users, together):
            last = min(first + together, self.num_users)
            yield _Walk(self, np.arange(first, last)).block()


class Block(NamedTuple):
    """Events of some users: rows, kinds (type codes), times, values [E], sorted by (user, time).

    users [U], offsets [U + 1]: user u's events are `[offsets[u]:offsets[u + 1]]`; region [U].
    """

    users: Ints
    region: Ints
    offsets: Ints
    rows: Ints
    kinds: Ints
    times: Ints
    values: Floats


class Standing(NamedTuple):
    """Where users stand: row, type and time of the last event [U], and what they left before.

    before_row, before_kind [U]: of the last event in another aisle than this one; -1 for none.
    """

    row: Ints
    kind: Ints
    time: Ints
    before_row: Ints
    before_kind: Ints


class _Walk:
    """Some users on their way through the shop, one step of all of them at a time."""

    def __init__(self, shop: SyntheticShop, users_U: Ints) -> None:
        self.shop, self.goods, self.users = shop, shop.stock, users_U
        self.stream = stream_of(shop.seed, users_U)
        self.late = self.draw("late") < LATE_USERS
        self.counts = self._counts()
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.rows, self.kinds, self.times = np.zeros((3, self.offsets[-1]), np.int64)
        self.before_row, self.before_kind = np.full((2, len(users_U)), -1)

    def draw(self, name: str, users_U: Ints | slice = EVERYONE, step: int | Ints = 0) -> Floats:
        """Return uniform numbers that depend on the seed, the user, the step and the name alone."""
        place = np.atleast_1d(step).astype(np.uint64) * np.uint64(len(DICE))
        return throw(self.stream[users_U], place + np.uint64(DICE.index(name) + 1))

    def block(self) -> Block:
        """Walk to the end of every user's events."""
        self._arrive()
        for step in range(1, int(self.counts.max())):
            self._step(np.flatnonzero(self.counts > step), step)
        columns = self.rows, self.kinds, self.times, self._values()
        return Block(self.users, self._regions(), self.offsets, *columns)

    def _counts(self) -> Ints:
        """Draw lengths from 3 up, a few users with very many; latecomers have a quarter of them."""
        long = -np.log1p(-self.draw("count")) - np.log1p(-self.draw("count again"))
        mean = self.shop.events_per_user / (1 - 0.75 * LATE_USERS)
        return np.maximum(3, mean * long / 2 * np.where(self.late, 0.25, 1)).astype(np.int64)

    def _arrive(self) -> None:
        share = self.draw("gap")
        day = np.where(self.late, 0.8 + 0.15 * share, 0.6 * share) * self.shop.days
        now = FIRST_DAY + day.astype(np.int64) * DAY + _clock(self.draw("clock"))
        aisle = (self.draw("aisle") * self.goods.num_aisles).astype(np.int64)
        first = self.offsets[:-1]
        self.rows[first] = popular(self.goods, aisle, now, self.draw("item"))
        self.kinds[first], self.times[first] = VIEW, now

    def _step(self, users: Ints, step: int) -> None:
        at = self.offsets[users] + step
        row, kind, time = (column[at - 1] for column in (self.rows, self.kinds, self.times))
        stand = Standing(row, kind, time, self.before_row[users], self.before_kind[users])
        acts = self.draw("act", users, step) < act_chance(self.goods, stand)
        leaves = ~acts & (self.draw("leave", users, step) < LEAVE_CHANCE)
        now = self._moment(users, step, stand.time, acts, leaves)
        chosen = choose(self.shop, stand, now, leaves, partial(self.draw, users_U=users, step=step))
        skips = (stand.kind == VIEW) & (self.draw("skip", users, step) < SKIP_FAVOURITE)
        self.rows[at] = np.where(acts, stand.row, chosen)
        self.kinds[at] = np.where(acts, stand.kind + 1 + skips, VIEW)
        self.times[at] = now
        moved = self.goods.aisle[self.rows[at]] != self.goods.aisle[stand.row]
        self.before_row[users[moved]] = stand.row[moved]
        self.before_kind[users[moved]] = stand.kind[moved]

    def _moment(self, users: Ints, step: int, time: Ints, acts: Bools, leaves: Bools) -> Ints:
        chance = self.draw("gap", users, step)
        look, act = _log_uniform(chance, LOOK_SECONDS), _log_uniform(chance, ACT_SECONDS)
        # The first of so many moments strewn over what is left: visits spread over the whole log.
        visits_left = 1 + LEAVE_CHANCE * (self.counts[users] - step)
        left = np.maximum(FIRST_DAY + self.shop.days * DAY - time, 0)
        away = left * (1 - (1 - chance) ** (1 / visits_left))
        earliest = time + HOUR
        day = (earliest + away.astype(np.int64)) // DAY
        back = day * DAY + _clock(self.draw("clock", users, step))
        back += np.where(back < earliest, DAY, 0)
        return np.where(leaves, back, time + np.where(acts, act, look))

    def _values(self) -> Floats:
        """Return dwell seconds of views, the price paid of purchases, NaN of the rest."""
        users = np.repeat(np.arange(len(self.users)), self.counts)
        chance = self.draw("dwell", users, np.arange(len(users)) - self.offsets[users])
        gap = np.diff(self.times, append=0)
        gap[self.offsets[1:] - 1] = DAY
        dwell = np.where(gap < HOUR, gap * (0.5 + chance / 2), _log_uniform(chance, LOOK_SECONDS))
        values = np.where(self.kinds == PURCHASE, self.goods.price[self.rows], np.nan)
        return np.where(self.kinds == VIEW, dwell / 1000, values)

    def _regions(self) -> Ints:
        """Return where users live: mostly where their first aisle is in demand."""
        home = self.goods.aisle[self.rows[self.offsets[:-1]]] % len(REGIONS)
        anywhere = (self.draw("region") * len(REGIONS)).astype(np.int64)
        return np.where(self.draw("at home") < 0.7, home, anywhere)


def choose(
    shop: SyntheticShop, stand: Standing, now: Ints, leaves: Bools, draw: Callable[[str], Floats]
) -> Ints:
    """Draw the rows that users look at next, where they do not act; `draw` gives their dice."""
    goods = shop.stock
    aisle = _pick(*drift(shop, stand, now, leaves), draw("aisle"))
    here = aisle == goods.aisle[stand.row]
    row = np.where(here, stand.row, stand.before_row)
    kind = np.where(here, stand.kind, stand.before_kind)
    along_US = following(goods, row, kind)
    along = _pick(along_US, np.broadcast_to(NEXT_STEPS, along_US.shape), draw("step"))
    follows = (row >= 0) & (aisle == goods.aisle[row])
    follows &= draw("follow") < shop.follow
    follows &= goods.first_sale[along] <= now
    return np.where(follows, along, popular(goods, aisle, now, draw("item")))


def act_chance(goods: Stock, stand: Standing) -> Floats:
    """Return the chance that the next event is an act on the same item."""
    return ACT_CHANCE[stand.kind] * goods.desire[stand.row]


def drift(shop: SyntheticShop, stand: Standing, now: Ints, leaves: Bools) -> tuple[Ints, Floats]:
    """Return four candidate aisles and their weights, both [U, K]; an aisle may be there twice."""
    goods = shop.stock
    here = goods.aisle[stand.row]
    earlier = np.where(stand.before_row >= 0, goods.aisle[stand.before_row], here)
    sides = (here - 1) % goods.num_aisles, (here + 1) % goods.num_aisles
    aisles_UK = np.stack([here, earlier, *sides], axis=1)
    return aisles_UK, shop.drift[leaves.astype(np.int64)] * goods.tilt(aisles_UK, now[:, None])


def following(goods: Stock, row: Ints, kind: Ints) -> Ints:
    """Return the next few items along the aisle, or across it after more than a view: [U, S]."""
    start = goods.starts[goods.aisle[row]]
    size = goods.starts[goods.aisle[row] + 1] - start
    place = row - start + np.where(kind > VIEW, size // 2, 0)
    steps = np.arange(1, len(NEXT_STEPS) + 1)
    return start[:, None] + (place[:, None] + steps) % size[:, None]


def popular(goods: Stock, aisle: Ints, now: Ints, chance: Floats) -> Ints:
    """Draw one item on sale in each aisle, by popularity."""
    start, end = goods.starts[aisle], goods.on_sale(aisle, now)
    low, high = goods.mass_before[start], goods.mass_before[end]
    row = np.searchsorted(goods.mass_before, low + chance * (high - low), side="right") - 1
    return np.clip(row, start, end - 1)


def truth_of(dataset: Dataset) -> ShopTruth | None:
    """Return what is known of the shop that a dataset came from; None for any other."""
    source = dict(dataset.manifest.get("prepare", {}).get("source", {}))
    if source.pop("_target_", None) != f"{__name__}.{SyntheticShop.__name__}":
        return None
    return SyntheticShop(**source).truth(dataset.items["item_id"].to_pylist())


class Asked(Protocol):
    """What a score needs of an evaluation's batch."""

    @property
    def histories(self) -> Histories:
        """Everything before the events to predict."""
        ...

    @property
    def now(self) -> Ints:
        """When those events happen: int64 [B], milliseconds."""
        ...


class ShopTruth:
    """The exact law of a shop's next event, for items counted as a dataset counts them.

    item_ids: the id of item 1, item 2, …, as in a dataset's `items.parquet`. Raises InputError for
    an id that the shop does not sell.

    >>> truth = SyntheticShop(num_users=9, num_items=40, num_aisles=4).truth()
    >>> newcomer = Histories.of([(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))])
    >>> probability_BN = truth.probabilities(newcomer, np.array([FIRST_DAY]))
    >>> probability_BN.shape, float(probability_BN.sum().round(6))
    ((1, 40), 1.0)
    """

    name = "best achievable"

    def __init__(self, shop: SyntheticShop, item_ids: list[str]) -> None:
        self.shop, self.goods, self.item_ids = shop, shop.stock, item_ids
        rows = {name: row for row, name in enumerate(self.goods.item_ids)}
        strange = next((name for name in item_ids if name not in rows), None)
        if strange is not None:
            raise InputError(
                f"item {strange!r} is not sold in this synthetic shop of {len(rows)} items; ask "
                "the shop with the settings that the dataset was made with (its manifest.json)"
            )
        self.rows = np.array([rows[name] for name in item_ids], np.int64)

    def score(self, batch: Asked) -> Tensor:
        """Return the probabilities as an evaluation's scores [B, N + 1]; column 0 is padding."""
        import torch

        probability_BN = self.probabilities(batch.histories, batch.now)
        return torch.from_numpy(np.pad(probability_BN, ((0, 0), (1, 0))))

    def aisle_of(self, item_id: str) -> str:
        """Return the name of the aisle where an item stands."""
        return self.goods.aisle_names[self.goods.aisle[self.goods.item_ids.index(item_id)]]

    def items_of(self, aisle: str) -> list[str]:
        """Return the ids of an aisle's items, in the order in which people pass them."""
        return self.goods.item_ids[self._rows_of(aisle)]

    def path(self, aisle: str, length: int) -> list[str]:
        """Return a typical path: from the most popular item on, along the aisle."""
        rows = self._rows_of(aisle)
        items = self.goods.item_ids[rows]
        first = int(self.goods.weight[rows].argmax())
        return [items[(first + step) % len(items)] for step in range(length)]

    def _rows_of(self, aisle: str) -> slice:
        if aisle not in self.goods.aisle_names:
            raise InputError(
                f"no aisle {aisle!r} in this synthetic shop; expected one of "
                f"{', '.join(self.goods.aisle_names)}"
            )
        place = self.goods.aisle_names.index(aisle)
        return slice(int(self.goods.starts[place]), int(self.goods.starts[place + 1]))

    def probabilities(self, histories: Histories, now: Ints) -> Floats:
        """Return the probability that each item is the next event's: float64 [B, N].

        now: int64 [B], when the next event happens, in milliseconds. Column i - 1 is item i of
        `item_ids`. Takes memory for some B x N arrays: ask for a batch at a time.
        """
        known = histories.lengths > 0
        probability_BN = np.empty((len(histories), len(self.goods)))
        aisles_BA = np.full((int(np.sum(~known)), self.goods.num_aisles), 1 / self.goods.num_aisles)
        probability_BN[~known] = self._by_popularity(aisles_BA, now[~known])
        probability_BN[known] = self._after(self.standing(histories, known), now[known])
        return probability_BN[:, self.rows]

    def chances(self, histories: Histories, now: Ints, items_BC: Ints) -> Floats:
        """Return `probabilities` of chosen items alone: float64 [B, C], with no array of all items.

        items_BC: places in `item_ids`, counted from 1; 0 is no item, and 0 its probability.

        >>> truth = SyntheticShop(num_users=9, num_items=40, num_aisles=4).truth()
        >>> newcomer = Histories.of([(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))])
        >>> truth.chances(newcomer, np.array([FIRST_DAY]), np.array([[1, 0]])).round(3)
        array([[0.012, 0.   ]])
        """
        rows_BC = self.rows[items_BC - 1]
        known = histories.lengths > 0
        chance_BC = self._share(rows_BC, now) / self.goods.num_aisles
        chance_BC[known] = self._chosen_after(
            self.standing(histories, known), now[known], rows_BC[known]
        )
        return chance_BC * (items_BC > 0)

    def standing(self, histories: Histories, known: Bools) -> Standing:
        """Read from the histories that have events where their users stand."""
        rows = self.rows[np.asarray(histories.items, np.int64) - 1]
        kinds = np.asarray(histories.types, np.int64)
        last = histories.offsets[1:][known] - 1
        owner = np.repeat(np.arange(len(last)), histories.lengths[known])
        elsewhere = self.goods.aisle[rows] != self.goods.aisle[rows[last]][owner]
        before = np.full(len(last), -1)
        np.maximum.at(before, owner[elsewhere], np.flatnonzero(elsewhere))
        before_row = np.where(before < 0, -1, rows[before])
        return Standing(rows[last], kinds[last], histories.times[last], before_row, kinds[before])

    def _after(self, stand: Standing, now: Ints) -> Floats:
        act, aisles_BK, weights_BK = self._onward(stand, now)
        aisles_BA = np.zeros((len(now), self.goods.num_aisles))
        np.add.at(aisles_BA, (np.arange(len(now))[:, None], aisles_BK), weights_BK)
        along_BN = self._along(stand.row, stand.kind, now, aisles_BA)
        along_BN += self._along(stand.before_row, stand.before_kind, now, aisles_BA)
        aisles_BA -= np.add.reduceat(along_BN, self.goods.starts[:-1], axis=1)
        probability_BN = along_BN + self._by_popularity(aisles_BA, now)
        probability_BN[np.arange(len(now)), stand.row] += act
        return probability_BN

    def _onward(self, stand: Standing, now: Ints) -> tuple[Floats, Ints, Floats]:
        """Return how probable an act is [B], and else the aisles to go on in, both [B, K]."""
        act = self._act_given_gap(act_chance(self.goods, stand), now - stand.time)
        aisles_BK, weights_BK = drift(self.shop, stand, now, now - stand.time >= HOUR)
        weights_BK *= ((1 - act) / weights_BK.sum(1))[:, None]
        return act, aisles_BK, weights_BK

    def _chosen_after(self, stand: Standing, now: Ints, rows_BC: Ints) -> Floats:
        act, aisles_BK, weights_BK = self._onward(stand, now)
        aisle_BC = self.goods.aisle[rows_BC]
        chance_BC = (rows_BC == stand.row[:, None]) * act[:, None]
        left_BC = _sum_where(aisle_BC, aisles_BK, weights_BK)
        paths = (stand.row, stand.kind), (stand.before_row, stand.before_kind)
        for row, kind in paths:
            aisle = self.goods.aisle[row][:, None]
            within = _sum_where(aisle, aisles_BK, weights_BK)[:, 0]
            along_BS, spread_BS = self._steps(row, kind, now, within)
            chance_BC += _sum_where(rows_BC, along_BS, spread_BS)
            left_BC -= (aisle_BC == aisle) * spread_BS.sum(1)[:, None]
        return chance_BC + left_BC * self._share(rows_BC, now)

    def _act_given_gap(self, prior: Floats, gap: Ints) -> Floats:
        """Bayes: how probable an act is once it is known how long the next event took."""
        act = prior * _log_density(gap, ACT_SECONDS)
        look = (1 - prior) * (1 - LEAVE_CHANCE) * _log_density(gap, LOOK_SECONDS)
        return np.divide(act, act + look, out=np.zeros_like(act), where=act > 0)

    def _along(self, row: Ints, kind: Ints, now: Ints, aisles_BA: Floats) -> Floats:
        """Return the part of its aisle's probability that goes along from `row`: [B, N]."""
        every_B = np.arange(len(now))
        within = aisles_BA[every_B, self.goods.aisle[row]]
        along_BS, spread_BS = self._steps(row, kind, now, within)
        probability_BN = np.zeros((len(now), len(self.goods)))
        np.add.at(probability_BN, (every_B[:, None], along_BS), spread_BS)
        return probability_BN

    def _steps(self, row: Ints, kind: Ints, now: Ints, within: Floats) -> tuple[Ints, Floats]:
        """Return the next rows along from `row` and their part of its aisle's chance: [B, S]."""
        along_BS = following(self.goods, row, kind)
        on_sale_BS = self.goods.first_sale[along_BS] <= now[:, None]
        chance_B = self.shop.follow * within * (row >= 0)
        return along_BS, chance_B[:, None] * NEXT_STEPS * on_sale_BS

    def _share(self, rows_BC: Ints, now: Ints) -> Floats:
        """Return each row's share of its aisle's popularity on sale: [B, C]."""
        aisle_BC = self.goods.aisle[rows_BC]
        before = self.goods.mass_before
        mass_BC = before[self.goods.on_sale(aisle_BC, now[:, None])]
        mass_BC -= before[self.goods.starts[aisle_BC]]
        on_sale_BC = self.goods.first_sale[rows_BC] <= now[:, None]
        return self.goods.weight[rows_BC] * on_sale_BC / mass_BC

    def _by_popularity(self, aisles_BA: Floats, now: Ints) -> Floats:
        """Spread each aisle's probability over its items on sale: [B, N]."""
        every = np.broadcast_to(np.arange(self.goods.num_aisles), aisles_BA.shape)
        end_BA = self.goods.on_sale(every, now[:, None])
        mass_BA = self.goods.mass_before[end_BA] - self.goods.mass_before[self.goods.starts[:-1]]
        weight_BN = self.goods.weight * (self.goods.first_sale <= now[:, None])
        return (aisles_BA / mass_BA)[:, self.goods.aisle] * weight_BN


EVENTS = pa.schema(
    {
        "user_id": pa.dictionary(pa.int32(), pa.string()),
        "item_id": pa.dictionary(pa.int32(), pa.string()),
        "timestamp": pa.int64(),
        "event_type": pa.dictionary(pa.int32(), pa.string()),
        "value": pa.float32(),
    }
)
USERS = pa.schema({"user_id": pa.string(), "region": pa.string()})


def _event_table(block: Block, goods: Stock) -> pa.Table:
    owner = np.repeat(np.arange(len(block.users)), np.diff(block.offsets))
    columns = [
        coded(owner, user_ids(block.users)),
        coded(block.rows, goods.item_ids),
        pa.array(block.times),
        coded(block.kinds - 1, list(EVENT_TYPES)),
        pa.array(block.values, pa.float32(), from_pandas=True),
    ]
    return pa.table(columns, schema=EVENTS)


def _user_table(block: Block) -> pa.Table:
    regions = pa.array(REGIONS).take(pa.array(block.region))
    return pa.table([pa.array(user_ids(block.users)), regions], schema=USERS)


def user_ids(users: Ints) -> list[str]:
    """Return the ids of users by number."""
    return [f"user-{user:07d}" for user in users]


def coded(codes: Ints, words: list[str]) -> pa.DictionaryArray:
    """Return words by their places among `words`."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(words))


def stream_of(seed: int, numbers: Ints) -> NDArray[np.uint64]:
    """Return where each number's own dice begin, such as each user's."""
    return _mix(_mix(np.array([seed + 1], np.uint64)) ^ numbers.astype(np.uint64))


def throw(stream: NDArray[np.uint64], place: NDArray[np.uint64]) -> Floats:
    """Return the uniform numbers at these places of streams."""
    return (_mix(stream + place * GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): neighbours in, unrelated numbers out."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _sum_where(asked_BC: Ints, keys_BK: Ints, weights_BK: Floats) -> Floats:
    """Sum each asked key's weights: [B, C]; in turns, so that nothing is [B, C, K]."""
    columns = zip(keys_BK.T, weights_BK.T, strict=True)
    return sum(
        ((asked_BC == key[:, None]) * weight[:, None] for key, weight in columns),
        np.zeros(asked_BC.shape),
    )


def _pick(choices_UK: Ints, weights_UK: Floats, chance_U: Floats) -> Ints:
    """Draw one of each row's choices by its weights."""
    upto_UK = np.cumsum(weights_UK, axis=1)
    place = (upto_UK <= (chance_U * upto_UK[:, -1])[:, None]).sum(1)
    return choices_UK[np.arange(len(choices_UK)), np.minimum(place, choices_UK.shape[1] - 1)]


def _clock(chance: Floats) -> Ints:
    """Draw a time of day in milliseconds: busiest in the evening."""
    target = chance * BUSY_HOURS[-1]
    hour = np.searchsorted(BUSY_HOURS, target, side="right")
    low = np.concatenate([[0], BUSY_HOURS])
    return ((hour + (target - low[hour]) / (low[hour + 1] - low[hour])) * HOUR).astype(np.int64)


def _log_uniform(chance: Floats, seconds: tuple[int, int]) -> Ints:
    """Draw milliseconds between two limits, each doubling as probable as the next."""
    low, high = seconds
    return (1000 * low * (high / low) ** chance).astype(np.int64)


def _log_density(gap: Ints, seconds: tuple[int, int]) -> Floats:
    """Return how densely `_log_uniform` draws each gap, per unit of its logarithm."""
    low, high = seconds
    return ((gap >= 1000 * low) & (gap < 1000 * high)) / np.log(high / low)
