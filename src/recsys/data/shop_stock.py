"""The shelves of the synthetic shop: aisles, items, their names, prices, quality and vectors.

Shapes: A aisles, N items, D vector dimensions. Rows are sorted by (aisle, first sale), so the items
of an aisle that are on sale at a moment are one run of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

HOUR = 3_600_000
DAY = 24 * HOUR
FIRST_DAY = 20_454 * DAY
"""The log begins on 2026-01-01, in milliseconds since 1970."""
VECTOR_DIM = 16
LATE_SHARE = 0.1
"""Share of each aisle's items that first go on sale while the log runs."""
ZIPF = 0.8
HOUR_TILT, SEASON_TILT = 1.0, 0.5
"""How strongly an aisle's hours and season move its log weight."""

AISLES = {
    "Garden tools": ("pruning shears", "spade", "watering can", "rake", "garden gloves"),
    "Plants and seeds": ("tomato seeds", "lavender", "potting soil", "olive tree", "tulip bulbs"),
    "Outdoor furniture": ("deck chair", "parasol", "garden bench", "hammock", "fire bowl"),
    "Camping": ("two-person tent", "sleeping bag", "camping stove", "head torch", "cool box"),
    "Hiking": ("walking boots", "rucksack", "trekking poles", "rain jacket", "water bottle"),
    "Cycling": ("bike helmet", "bike lock", "pannier bag", "floor pump", "cycling jersey"),
    "Fitness": ("yoga mat", "kettlebell", "skipping rope", "foam roller", "resistance bands"),
    "Running": ("running shoes", "running shorts", "sports watch", "running belt", "wind vest"),
    "Shoes": ("leather boots", "sneakers", "sandals", "loafers", "shoe care set"),
    "Bags": ("tote bag", "weekend bag", "laptop sleeve", "purse", "suitcase"),
    "Jewellery": ("silver ring", "pearl earrings", "bracelet", "pendant", "wrist watch"),
    "Skin care": ("face cream", "sun lotion", "serum", "lip balm", "hand cream"),
    "Bath": ("bath towel", "bath salts", "shower head", "soap dish", "bathrobe"),
    "Bedding": ("duvet", "linen sheets", "pillow", "blanket", "mattress topper"),
    "Lighting": ("desk lamp", "pendant light", "string lights", "floor lamp", "candle holder"),
    "Wall decor": ("picture frame", "art print", "wall mirror", "wall clock", "tapestry"),
    "Tableware": ("dinner plates", "wine glasses", "cutlery set", "teapot", "serving bowl"),
    "Cookware": ("frying pan", "casserole", "chef's knife", "stock pot", "baking tray"),
    "Coffee": ("espresso beans", "coffee grinder", "french press", "milk frother", "mug"),
    "Power tools": ("cordless drill", "jigsaw", "sander", "tool box", "work gloves"),
}
"""Aisles in the order in which they neighbour one another, each with what it sells."""

FOUNDERS = ("Oak", "Fjord", "Alder", "Hazel", "Marlow", "Juno", "Copper", "Linden", "Wren", "Birch")
HOUSES = ("& Co.", "Works", "Brothers", "Studio", "Supply")


@dataclass(frozen=True)
class Stock:
    """What the shop sells and how it tilts choices.

    Per item [N]: aisle, weight (popularity), quality, price, first_sale (milliseconds). Per aisle:
    starts [A + 1] (its rows), hour_tilt [A, 24] and day_tilt [A, 365] (factors on its weight).
    """

    aisle: NDArray[np.int64]
    weight: NDArray[np.float64]
    quality: NDArray[np.float64]
    price: NDArray[np.float64]
    first_sale: NDArray[np.int64]
    starts: NDArray[np.int64]
    hour_tilt: NDArray[np.float64]
    day_tilt: NDArray[np.float64]
    seed: int

    @classmethod
    def fill(cls, num_items: int, num_aisles: int, days: int, seed: int) -> Stock:
        """Fill the shelves, the same for the same arguments."""
        rng = np.random.default_rng([seed, 0])
        aisle = np.arange(num_items) * num_aisles // num_items
        starts = np.searchsorted(aisle, np.arange(num_aisles + 1))
        quality = rng.normal(size=num_items)
        rank = _rank_within(aisle, -quality - rng.normal(size=num_items)) - starts[aisle]
        price = rng.normal(3, 0.5, num_aisles)[aisle] + quality / 4 + rng.normal(0, 0.4, num_items)
        return cls(
            aisle=aisle,
            weight=np.asarray((1.0 + rank) ** -ZIPF, np.float64),
            quality=quality,
            price=np.exp(price).round(2),
            first_sale=_first_sales(aisle, starts, days, rng),
            starts=starts,
            hour_tilt=_waves(rng.uniform(size=num_aisles), 24, HOUR_TILT),
            day_tilt=_waves(rng.uniform(size=num_aisles), 365, SEASON_TILT),
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.aisle)

    @property
    def num_aisles(self) -> int:
        """How many aisles there are."""
        return len(self.starts) - 1

    @cached_property
    def desire(self) -> NDArray[np.float64]:
        """How much each item makes people want it, 0 to 1: good ones more, dear ones less."""
        dear = np.log(self.price) - np.log(self.price).mean()
        return 1 / (1 + np.exp(0.7 * dear - self.quality))

    @cached_property
    def mass_before(self) -> NDArray[np.float64]:
        """Popularity of all rows before each row: [N + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.weight)])

    @cached_property
    def _sale_keys(self) -> NDArray[np.int64]:
        return self._sale_key(self.aisle, self.first_sale)

    def _sale_key(self, aisle: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.int64]:
        since = np.clip(time - self.first_sale.min(), 0, 2**40 - 1)
        return aisle * 2**40 + since

    def on_sale(self, aisle: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row after the last one on sale in each aisle at each moment."""
        return np.searchsorted(self._sale_keys, self._sale_key(aisle, now), side="right")

    def tilt(self, aisle: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the factor of hour and season on each aisle's weight at each moment."""
        hour, day = now // HOUR % 24, now // DAY % 365
        return self.hour_tilt[aisle, hour] * self.day_tilt[aisle, day]

    @cached_property
    def item_ids(self) -> list[str]:
        """Each item's id, in row order."""
        return [f"item-{row:06d}" for row in range(len(self))]

    @cached_property
    def aisle_names(self) -> list[str]:
        """Each aisle's name; past the known ones they are numbered."""
        names = list(AISLES)
        rounds = [divmod(aisle, len(names)) for aisle in range(self.num_aisles)]
        return [names[place] + (f" {again + 1}" if again else "") for again, place in rounds]

    def table(self) -> pa.Table:
        """Return the item table, one row an item."""
        rng = np.random.default_rng([self.seed, 1])
        brands = np.array([f"{founder} {house}" for founder in FOUNDERS for house in HOUSES])
        brand = brands[rng.integers(len(brands), size=len(self))]
        stars = np.clip(np.round(3.5 + self.quality, 1), 1, 5)
        columns = {
            "item_id": self.item_ids,
            "title": self._titles(brand, rng),
            "category": pa.array(self.aisle_names).take(pa.array(self.aisle)),
            "brand": brand,
            "price": self.price.astype(np.float32),
            "rating": stars.astype(np.float32),
            "first_sale_day": ((self.first_sale - FIRST_DAY) // DAY).astype(np.int32),
            "vector": self._vectors(rng),
        }
        return pa.table(columns)

    def _titles(self, brand: NDArray[np.str_], rng: np.random.Generator) -> list[str]:
        goods = np.array(list(AISLES.values()))[self.aisle % len(AISLES)]
        good = goods[np.arange(len(self)), rng.integers(goods.shape[1], size=len(self))]
        number = rng.integers(2, 100, size=len(self))
        return [f"{b} {g} {n}" for b, g, n in zip(brand, good, number, strict=True)]

    def _vectors(self, rng: np.random.Generator) -> pa.Array:
        """Describe each item by its aisle's centre and its place along the aisle, with noise."""
        centre_AD, across_AD, along_AD = rng.normal(size=(3, self.num_aisles, VECTOR_DIM))
        place = np.arange(len(self)) - self.starts[self.aisle]
        angle = 2 * np.pi * place / np.diff(self.starts)[self.aisle]
        vector_ND = centre_AD[self.aisle] + 0.1 * rng.normal(size=(len(self), VECTOR_DIM))
        vector_ND += np.cos(angle)[:, None] * across_AD[self.aisle] / 2
        vector_ND += np.sin(angle)[:, None] * along_AD[self.aisle] / 2
        offsets = np.arange(len(self) + 1, dtype=np.int32) * VECTOR_DIM
        return pa.ListArray.from_arrays(offsets, vector_ND.astype(np.float32).ravel())


def _rank_within(aisle: NDArray[np.int64], key: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each row's place when rows are sorted by (aisle, key)."""
    rank = np.empty(len(aisle), np.int64)
    rank[np.lexsort((key, aisle))] = np.arange(len(aisle))
    return rank


def _first_sales(
    aisle: NDArray[np.int64], starts: NDArray[np.int64], days: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Put most items on sale in the year before the log, the last of each aisle during it."""
    place = (np.arange(len(aisle)) - starts[aisle]) / np.diff(starts)[aisle]
    chance = rng.uniform(size=len(aisle))
    late = (place > 0) & (place >= 1 - LATE_SHARE)
    day = np.where(late, days * (0.4 + 0.5 * chance), -365 * chance)
    return FIRST_DAY + (day[np.lexsort((day, aisle))] * DAY).astype(np.int64)


def _waves(peak: NDArray[np.float64], period: int, strength: float) -> NDArray[np.float64]:
    turn = np.arange(period) / period - peak[:, None]
    return np.exp(strength * np.cos(2 * np.pi * turn))
