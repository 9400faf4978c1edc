"""The verbs that Hydra configures: prepare, train, evaluate, export, run, and sweeps."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console

from recsys.artifacts import Workspace
from recsys.config import OF_RANKING, OF_RETRIEVAL, config_dir
from recsys.data.dataset import Dataset
from recsys.schema import InputError, suggestion

CONFIG = "recsys"
SECTIONS = ("evaluation", "registry", "ranking", "grow")
"""Parts that no constructor checks: a key which the shipped config lacks is refused here."""
LEAST: dict[str, tuple[type, float]] = {
    "seed": (int, 0),
    "workers": (int, 0),
    "patience": (int, 1),
    "batches.size": (int, 1),
    "model.dim": (int, 1),
    "model.max_length": (int, 2),
    "loss.shared": (int, 1),
    "optimizer.lr": (float, 0),
    "ranking.listwise": (float, 0),
    "ranking.candidates": (int, 1),
}
"""The least value of settings that no constructor checks."""
OF_FIRST = (*OF_RETRIEVAL, "model", "batches", "name")
"""What `recsys run` reads for retrievers alone where a second stage follows."""


def configure(overrides: Sequence[str]) -> DictConfig:
    """Return the composed config; raises what Hydra raises, or InputError for an idle setting."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(CONFIG, overrides=[_as_path(word) for word in overrides])
        shipped = compose(CONFIG)
    check(config, shipped, overrides)
    return config


def _as_path(word: str) -> str:
    """Quote the value of a setting that names a file, whose name Hydra would read as its grammar.

    >>> _as_path("data.path=/"), _as_path("model.dim=64")
    ("data.path='/'", 'model.dim=64')
    """
    name, _, value = word.partition("=")
    if re.search(r"[^\w.]", value) is None or "'" in value or not os.path.exists(value):
        return word
    return f"{name}='{value}'"


def check(config: DictConfig, shipped: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse idle, unknown and impossible settings; raises InputError."""
    _leave_out_making(config, overrides)
    _refuse_idle(config, shipped, overrides)
    _refuse_impossible(config)


def _refuse_impossible(config: DictConfig) -> None:
    """Refuse values that a training would stumble over late, or read as something else."""
    for key, (kind, least) in LEAST.items():
        value = OmegaConf.select(config, key)
        if value is None:
            continue
        number = isinstance(value, kind | int) and not isinstance(value, bool)
        if not number or not least <= value < math.inf:
            words = "a whole number" if kind is int else "a number"
            raise InputError(f"{key}={value}: expected {words}, {least:g} or more")


def _leave_out_making(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where a dataset is there already, leave out how an experiment would have it made."""
    if "dataset" not in config.data:
        return
    makes = [f"data.{name}" for name in config.data if name != "dataset"]
    for override in overrides:
        if any(f"{override.partition('=')[0]}.".startswith(f"{made}.") for made in makes):
            raise InputError(
                f"{override} has no effect on an existing dataset; prepare one with it: recsys "
                "prepare data=… data.path=…"
            )
    config.data = {"dataset": config.data.dataset}


def _refuse_idle(config: DictConfig, shipped: DictConfig, overrides: Sequence[str]) -> None:
    _refuse_unknown("", config, shipped)
    _refuse_of_other_stage(config, overrides)
    _refuse_of_growth(config, overrides)
    if config.resume_from is None and any(_part(o) == "replay" for o in overrides):
        raise InputError("replay has no effect without a run to continue: resume_from=RUN")
    for section in SECTIONS:
        _refuse_unknown(f"{section}.", config[section], shipped[section])
    parts = {str(name): node for name, node in config.items()}
    for section, node in {**parts, "data.source": config.data.get("source")}.items():
        if isinstance(node, DictConfig) and "_target_" in node:
            known = inspect.signature(get_object(node._target_)).parameters
            _refuse_unknown(f"{section}.", [k for k in node if not str(k).startswith("_")], known)
    if "source" not in config.data and any(o.startswith("split") for o in overrides):
        raise InputError(
            "split= has no effect on an existing dataset, which keeps the split it was prepared "
            "with; prepare again: recsys prepare data=… data.path=… split=…"
        )


def _refuse_of_other_stage(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse what was typed for retrieval where a ranker is trained, and the other way round."""
    ranker = get_object(config.model._target_).layout == "shown"
    other, wanted = (OF_RETRIEVAL, "a retriever") if ranker else (OF_RANKING, "model=ranker")
    for override in overrides:
        if _part(override) in other:
            met = str(config.model._target_).rsplit(".", 1)[-1]
            raise InputError(f"{override} has no effect on {met}: it is for {wanted}; leave it out")


def _refuse_of_growth(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse what has no effect where a dataset grows, and `grow` where none does."""
    from recsys.data.grow import KEPT

    grows = config.grow.onto is not None and "source" in config.data
    kept = [f"data.{name}" for name in KEPT]
    for override in overrides:
        if not grows and _part(override) == "grow":
            raise InputError(
                f"{override} has no effect without both a dataset that grows and a log of new "
                "days: recsys prepare data=events data.path=day.csv grow.onto=DATASET"
            )
        if grows and (_part(override) == "split" or override.lstrip("+").split("=")[0] in kept):
            raise InputError(
                f"{override} has no effect with grow.onto={config.grow.onto}: the dataset keeps "
                "what it was first prepared with; leave it out"
            )


def _part(override: str) -> str:
    """Return which part of the config an override is of.

    >>> _part("+ranking.blend.view=1")
    'ranking'
    """
    return re.split(r"[=./@]", override.lstrip("+~"))[0]


def _refuse_unknown(where: str, met: Iterable[Any], known: Iterable[Any]) -> None:
    there = [str(key) for key in known]
    for key in map(str, met):
        if key not in there:
            raise InputError(
                f"unknown setting {where}{key}"
                + suggestion(key, there)
                + f"; there {'is' if len(there) == 1 else 'are'}: {', '.join(there)}"
            )


def open_dataset(config: DictConfig, workspace: Workspace) -> Dataset:
    """Return the existing dataset that `data` names, or prepare it."""
    from recsys.data.grow import Growth, grow
    from recsys.data.prepare import prepare as prepare_dataset

    if "source" not in config.data:
        dataset = Dataset(workspace.find("dataset", config.data.dataset))
    else:
        settings = {k: v for k, v in _plain(config.data).items() if k != "source"}
        source = instantiate(config.data.source)
        dataset = (
            prepare_dataset(settings, source, _plain(config.split), workspace)
            if config.grow.onto is None
            else grow(Growth(**config.grow), settings, source, workspace)
        )
    with open_dict(config):
        config.split = dataset.manifest["split"]
    return dataset


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def prepare(overrides: Sequence[str], workspace: Workspace) -> Dataset:
    """Prepare the dataset that `data=` describes."""
    config = configure(overrides)
    if "source" not in config.data:
        raise InputError(
            "nothing to prepare: name a source, as in\n"
            "  recsys prepare data=events data.path=log.csv\n"
            f"sources: {', '.join(sorted(p.stem for p in (config_dir() / 'data').glob('*.yaml')))}"
        )
    dataset = open_dataset(config, workspace)
    _show(dataset)
    return dataset


def _show(dataset: Dataset) -> None:
    from recsys.data.summary import summary

    Console().print(summary(dataset))


def train(overrides: Sequence[str], workspace: Workspace, flags: Sequence[str] = ()) -> Any:
    """Train one run, or go on with an unfinished one; print its test.

    Returns None where it was trained in processes of its own, which got the words of this one.
    """
    from recsys import peers
    from recsys.training.processes import spread
    from recsys.training.train import AUTO
    from recsys.training.warm import continued

    config = configure(overrides)
    if config.resume_from is not None and config.resume in (None, AUTO):
        config = continued(config, overrides, workspace)
    resumed = _resumed(config, overrides, workspace)
    if spread(config, ["train", *overrides, *flags]):
        return None
    trained = _train(config, resumed, workspace)
    if not peers.first():
        return None
    trained.tested.show(Console())
    return trained


def _resumed(config: DictConfig, overrides: Sequence[str], workspace: Workspace) -> Path | None:
    """Return the run to go on with, whose trainer then is the config's, or None for a new one."""
    from recsys.training.runs import read_config
    from recsys.training.train import AUTO, unfinished

    if config.resume in (None, AUTO):
        return unfinished(config, workspace)
    others = [o for o in overrides if not o.startswith("resume=")]
    if others:
        raise InputError(f"a resumed run keeps its settings; leave out {' '.join(others)}")
    run = workspace.find("run", config.resume)
    config.trainer = read_config(run).trainer
    return run


def _train(config: DictConfig, resumed: Path | None, workspace: Workspace) -> Any:
    from recsys.training.processes import told
    from recsys.training.train import resume
    from recsys.training.train import train as train_run

    if resumed is not None:
        return resume(resumed, workspace)
    # One process prepares; the others open what it made.
    path = told("dataset", lambda: str(open_dataset(config, workspace).path))
    dataset = Dataset(Path(path))
    with open_dict(config):
        config.split = dataset.manifest["split"]
    _show(dataset)
    return train_run(config, dataset, workspace)


def evaluate(run: Path, workspace: Workspace) -> Any:
    """Rank the test part again for a finished run; print it by slice."""
    from recsys.training.train import retest

    trained = retest(run, workspace)
    trained.tested.show(Console(), slices=True)
    return trained


def sweep(overrides: Sequence[str]) -> None:
    """Train once for each point of a multirun; Optuna's sweeper gets what training maximised."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    _refuse_in_sweep(overrides)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        shipped = compose(CONFIG)

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=CONFIG)
    def job(config: DictConfig) -> float:
        words = [str(word) for word in HydraConfig.get().overrides.task]
        try:
            trained = _point(config, shipped, words)
        except InputError as error:  # which Hydra would show as a traceback
            print(f"recsys train {' '.join(words)}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        trained.tested.show(Console())
        return float(trained.reached)

    sys.argv = ["recsys train", "--multirun", *overrides]
    job()


def _point(config: DictConfig, shipped: DictConfig, words: Sequence[str]) -> Any:
    """Train one point of a multirun as it would be trained alone."""
    from recsys.training.warm import continued

    workspace = Workspace()
    check(config, shipped, words)
    if config.resume_from is not None:
        config = continued(config, words, workspace)
    return _train(config, None, workspace)


def _refuse_in_sweep(overrides: Sequence[str]) -> None:
    """Refuse what cannot be of several trainings, or not of several processes each."""
    for override in overrides:
        name, _, value = override.partition("=")
        if name == "resume":
            raise InputError(f"{override} is of one run; leave out -m")
        if name == "name" and "," not in value:
            raise InputError(f"{override} would be the name of every training; leave it out")
        if name == "trainer" and "ddp" in value:
            raise InputError(f"{override} is for one training; leave out -m, or use trainer=cpu")


@dataclass(frozen=True)
class Exported:
    """A bundle, and its name in MLflow's registry where it was registered."""

    bundle: Path
    model: str | None


def export(
    run: Path, overrides: Sequence[str], workspace: Workspace, promote: bool = False
) -> Exported:
    """Write a run's bundle and register it."""
    from recsys.export.bundle import export as export_run
    from recsys.training.runs import read_config

    config = configure(overrides)
    bundle = export_run(run, workspace, _plain(config.index))
    if not config.registry.register or read_config(run).logger.kind != "mlflow":
        return Exported(bundle, None)
    from recsys.export.registry import register

    name = config.registry.name
    version = register(bundle, workspace, name, promote or config.registry.promote)
    return Exported(bundle, f"models:/{name}/{version}")


@dataclass(frozen=True)
class Done:
    """What `recsys run` made: a training a variant, perhaps a ranker, and the bundle."""

    trained: dict[str, Any]
    bundle: Path
    facts: dict[str, Any]


def run(overrides: Sequence[str], workspace: Workspace) -> Done:
    """Prepare, train and evaluate each variant, and a ranker of the first; export both stages."""
    from recsys.training.train import train as train_run

    configs, second = _stages(overrides)
    datasets = {name: open_dataset(config, workspace) for name, config in configs.items()}
    for dataset in {d.path: d for d in datasets.values()}.values():
        _show(dataset)
    trained = {}
    for name, config in configs.items():
        print(f"\n{name}", file=sys.stderr, flush=True)
        trained[name] = train_run(config, datasets[name], workspace)
    _show_tests({name: one.tested for name, one in trained.items()})
    ranker, first = None, next(iter(trained.values()))
    if second is not None:
        print("\nsecond stage", file=sys.stderr, flush=True)
        second.ranking.retriever = str(first.run)
        ranker = train_run(second, open_dataset(second, workspace), workspace)
        ranker.tested.show(Console())
    wanted = [o for o in overrides if _part(o) in ("index", "registry")]
    exported = export((ranker or first).run, wanted, workspace)
    facts = {
        **_facts(first),
        **({"second_stage": _facts(ranker)} if ranker else {}),
        "bundle": str(exported.bundle),
        "model": exported.model,
        "variants": {name: _facts(one) | {"seconds": one.seconds} for name, one in trained.items()},
    }
    return Done(trained, exported.bundle, facts)


def _facts(trained: Any) -> dict[str, Any]:
    return {"run": trained.run.name, **trained.tested.metrics}


def _show_tests(tests: dict[str, Any]) -> None:
    from recsys.training.testing import Tested, show_together

    retrievers = {name: test for name, test in tests.items() if isinstance(test, Tested)}
    show_together(retrievers, Console())
    for name, test in tests.items():
        if name not in retrievers:
            Console().print(f"\n[bold]{name}[/bold]")
            test.show(Console())


def _stages(overrides: Sequence[str]) -> tuple[dict[str, DictConfig], DictConfig | None]:
    """Return the config of each variant, and of the ranker of what the first one finds.

    Where there is a second stage, each stage gets what was typed for it; both read equally much.
    """
    from recsys.training.runs import short_name

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        second = list(compose(CONFIG, overrides=list(overrides)).second_stage)
    typed = [o for o in overrides if not (second and _part(o) in OF_RANKING)]
    config = configure(typed)
    named = {name: configure([*typed, *more]) for name, more in _plain(config.variants).items()}
    variants = named or {short_name(config.model._target_): config}
    if not second:
        return variants, None
    typed = [o for o in overrides if _part(o) not in OF_FIRST]
    alike = f"model.max_length={next(iter(variants.values())).model.max_length}"
    name = [f"name={config.name}-ranker"] if config.name else []
    return variants, configure([*typed, alike, *second, *name])


def explain_config(error: BaseException) -> str | None:
    """Return what is wrong with a config in words, with the closest setting that exists."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, InputError):
        return str(cause)
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key or error.key
        return f"{key} is missing; give it, as in {key}=…"
    text = str(error)
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return f"no setting {key[1]!r}{_closest(key[1])}; the settings are in {config_dir()}"
    option = re.search(r"Could not find '([^']+)'", text)
    if option:
        return f"no choice {option[1]!r}{_closest_choice(option[1])}"
    return text


def _closest(key: str) -> str:
    """Return which choices have a setting that this one lacks, or else the closest name of one."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        known = _keys(compose(CONFIG))
    group = key.partition(".")[0]
    owners = []
    for choice in sorted((config_dir() / group).glob("*.yaml")):
        own = _keys(cast(DictConfig, OmegaConf.load(choice)), f"{group}.")
        owners += [f"{group}={choice.stem}"] if key in own else []
        known += own
    if owners:
        more = " and others" if len(owners) > 3 else ""
        return f" with the other choices; it is of {', '.join(owners[:3])}{more}"
    return " with the other choices" if key in known else suggestion(key, known)


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key!s}")
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            keys += _keys(value, f"{prefix}{key!s}.")
    return keys


def _closest_choice(name: str) -> str:
    group = config_dir() / Path(name).parent
    there = sorted(path.stem for path in group.glob("*.yaml"))
    choices = f"; {Path(name).parent}= can be: {', '.join(there)}" if there else ""
    return suggestion(Path(name).name, there) + choices
