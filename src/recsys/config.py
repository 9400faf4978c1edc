"""Where the configs live: inside the wheel, or beside `src` in a checkout."""

from __future__ import annotations

from pathlib import Path

OF_RANKING = ("ranking", "features", "features_allow", "examples")
OF_RETRIEVAL = ("loss", "objective", "item_start", "embedding")
"""Settings of one stage alone."""


def config_dir() -> Path:
    """Return the directory of Hydra groups that ships with this copy of recsys."""
    here = Path(__file__).resolve().parent
    shipped = here / "configs"
    return shipped if shipped.is_dir() else here.parents[1] / "configs"
