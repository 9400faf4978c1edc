"""A small synthetic shop with both stages trained, and the settings of each."""

from __future__ import annotations

SHOP = [
    "data=synthetic",
    "split=temporal",
    "data.source.num_users=300",
    "data.source.num_items=120",
    "data.source.num_aisles=6",
    "data.source.events_per_user=15",
    "data.source.days=20",
    "data.source.impressions=6000",
]
COMMON = ["trainer=cpu", "logger=csv", "trainer.max_epochs=1", "patience=null", "batches.size=64"]
RETRIEVER = [*COMMON, "model.dim=16", "model.max_length=20"]
RANKER = [
    *COMMON,
    *("model=ranker", "batches=shown", "examples=impressions", "features=shop"),
    *("model.dim=8", "model.max_length=20", "ranking.candidates=20", "optimizer.lr=0.01"),
]
FEW = [
    "features=none",
    "+features.category={of: item, kind: categorical}",
    "+features.price={of: item, kind: numeric}",
    "+features.device={of: request, kind: categorical}",
]
SIMPLE = ["model/crossing=mlp", "model/path=none", "model/heads=shared_bottom"]
"""A quicker ranker, where it does not matter which."""
