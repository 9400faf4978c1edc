"""Every shipped YAML composes, and mirrors the constructor that it names."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from recsys.config import config_dir
from recsys.launch import configure
from recsys.schema import InputError

SHIPPED = sorted(config_dir().rglob("*.yaml"))
GROUPED = [path for path in SHIPPED if path.parent != config_dir()]
RANKING = ("features", "examples", "model/crossing", "model/path", "model/heads")
NEEDED = {"split": ["data=sequences", "data.path=x"]}
NEEDED |= {group: ["model=ranker"] for group in RANKING}
"""What a group is of no use without."""
PROVIDED = {"catalogue", "dataset", "seed", "length", "params", "layer", "fresh"}
PROVIDED |= {"query_PD", "target_P", "items", "weight_P", "table"}
PROVIDED |= {"layout", "tasks", "retriever", "crossing", "path", "heads", "shown", "inputs"}
"""Arguments that the code gives, not the config."""


@pytest.mark.parametrize("path", GROUPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_choice_composes(path: Path) -> None:
    group = str(path.parent.relative_to(config_dir()))
    config = configure([*NEEDED.get(group, []), f"{group}={path.stem}"])
    assert config.model.max_length > 0


def targets(node: object) -> list[dict]:
    if not isinstance(node, dict):
        return []
    found = [node] if "_target_" in node else []
    return found + [t for value in node.values() for t in targets(value)]


@pytest.mark.parametrize("path", GROUPED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_mirrors_its_constructor(path: Path) -> None:
    for node in targets(OmegaConf.to_container(OmegaConf.load(path))):
        if not node["_target_"].startswith("recsys."):
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        given = {key for key in node if not key.startswith("_")} - {"defaults"}
        assert given <= set(parameters), node["_target_"]
        if path.parent.name in ("model", "loss", "batches"):
            assert given == set(parameters) - PROVIDED, node["_target_"]


def test_an_experiment_is_a_short_diff() -> None:
    for path in config_dir().glob("experiment/*.yaml"):
        lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
        assert len(lines) <= 25, path
        assert "# @package _global_" in path.read_text()


def test_an_experiment_on_a_dataset_that_is_there_leaves_out_how_it_would_make_one() -> None:
    config = configure(["experiment=shop", "data=existing", "data.dataset=mine"])
    assert config.data == {"dataset": "mine"}
    assert not config.evaluation.exclude_seen
    with pytest.raises(InputError, match=r"data\.source\.impressions=5 has no effect on an exist"):
        configure(["experiment=shop", "data=existing", "data.source.impressions=5"])
