"""Loggers: MLflow on the workspace's store, or a CSV file where MLflow is not installed."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger

from recsys import peers
from recsys.artifacts import Workspace
from recsys.config import OF_RANKING, OF_RETRIEVAL
from recsys.data.dataset import Dataset
from recsys.schema import InputError

ANSWERS_WITHIN = 10.0
"""Seconds after which a server that does not answer is taken for none."""
BESIDE = (
    *("name", "resume", "variants", "second_stage", "workers", "checkpoint_every"),
    *("logger", "index", "registry", "grow"),
)
"""Settings that change where and how a run is kept or served, not what is learnt."""


class Tracker(Protocol):
    """Where a run's figures and files go."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, where there is one."""

    @property
    def logger(self) -> Logger | bool:
        """What Lightning logs to; False: nothing."""

    def start(self, config: DictConfig, dataset: Dataset, lineage: Mapping[str, Any]) -> None:
        """Note the resolved config, the dataset's lineage, and that of the run."""

    def finish(self, metrics: Mapping[str, float], files: list[Path]) -> None:
        """Note final metrics and keep `files` as artifacts."""

    def fail(self, error: BaseException) -> None:
        """Note that the run ended without a result."""


class Silent:
    """Notes nothing: what a process has that is not the first of a training."""

    run_id, logger = None, False

    def start(self, config: DictConfig, dataset: Dataset, lineage: Mapping[str, Any]) -> None:
        """The first process notes it."""

    def finish(self, metrics: Mapping[str, float], files: list[Path]) -> None:
        """The first process notes it."""

    def fail(self, error: BaseException) -> None:
        """The first process notes it."""


class CsvTracker:
    """Figures into `csv/version_N/metrics.csv` of the run directory, N up a resume."""

    run_id = None

    def __init__(self, folder: Path) -> None:
        self.logger = CSVLogger(folder, name="csv")

    def start(self, config: DictConfig, dataset: Dataset, lineage: Mapping[str, Any]) -> None:
        """Nothing more to note: the run directory holds its config."""

    def finish(self, metrics: Mapping[str, float], files: list[Path]) -> None:
        """Append the final metrics."""
        self.logger.log_metrics(dict(metrics))
        self.logger.save()

    def fail(self, error: BaseException) -> None:
        """Nothing more to note: a run that is not finished has no manifest."""


def _allowed(name: str) -> str:
    """Return a metric's name as MLflow writes and allows it.

    >>> _allowed("test/ndcg@10")
    'test/ndcg_at_10'
    """
    return re.sub(r"[^\w/.\- ]", "", name.replace("@", "_at_"))


class MlflowNames(MLFlowLogger):
    """Logs metrics under names that MLflow allows, and leaves it to the tracker to end the run."""

    def finalize(self, status: str = "success") -> None:
        """Do nothing: a training that went well is yet to be tested."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one step's metrics."""
        super().log_metrics({_allowed(k): v for k, v in metrics.items()}, step)


class MlflowTracker:
    """One MLflow run a training, continued under the same id when it is resumed."""

    def __init__(
        self, name: str, experiment: str, workspace: Workspace, run_id: str | None
    ) -> None:
        workspace.root.mkdir(parents=True, exist_ok=True)
        self.logger = MlflowNames(
            experiment_name=experiment,
            run_name=name,
            tracking_uri=workspace.tracking_uri,
            artifact_location=workspace.artifact_location,
            run_id=run_id,
        )
        self.run_id: str = self.logger.run_id  # type: ignore[assignment]

    def start(self, config: DictConfig, dataset: Dataset, lineage: Mapping[str, Any]) -> None:
        """Log parameters, the config as a file, tags, and the dataset as an input."""
        from mlflow.entities import Dataset as Input
        from mlflow.entities import DatasetInput

        client = self.logger.experiment
        if client.get_run(self.run_id).inputs.dataset_inputs:
            client.update_run(self.run_id, status="RUNNING")
            return
        experiment = client.get_run(self.run_id).info.experiment_id
        # Without it MLflow's pages open on language-model traces, of which there are none.
        client.set_experiment_tag(experiment, "mlflow.experimentKind", "custom_model_development")
        self.logger.log_hyperparams(_parameters(config))
        client.log_text(self.run_id, OmegaConf.to_yaml(config), "config.yaml")
        for key, value in (_tags(config) | _parents(lineage)).items():
            client.set_tag(self.run_id, key, value)
        facts = {"name": dataset.name, "digest": dataset.fingerprint}
        source = Input(source_type="local", source=str(dataset.path), **facts)
        client.log_inputs(self.run_id, datasets=[DatasetInput(source, tags=[])])

    def finish(self, metrics: Mapping[str, float], files: list[Path]) -> None:
        """Log final metrics and files, and close the run."""
        self.logger.log_metrics(dict(metrics))
        for file in files:
            folder = {".png": "plots", ".ckpt": "checkpoints"}.get(file.suffix)
            self.logger.experiment.log_artifact(self.run_id, str(file), folder)
        self.logger.experiment.set_terminated(self.run_id)

    def fail(self, error: BaseException) -> None:
        """Close the run: killed where it was told to end, else failed."""
        if _is_mlflow(error):
            return  # it does not answer, and would be waited for again
        told = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(Exception):  # the error that ends the training is the one to be told
            self.logger.experiment.set_terminated(self.run_id, "KILLED" if told else "FAILED")


def make_tracker(
    kind: str, name: str, experiment: str, folder: Path, workspace: Workspace, run_id: str | None
) -> Tracker:
    """Return the tracker that `logger=` names, `mlflow` or `csv`, in the first process."""
    if not peers.first():
        return Silent()
    if kind == "csv":
        return CsvTracker(folder)
    _check_answers(workspace.tracking_uri)
    try:
        return MlflowTracker(name, experiment, workspace, run_id)
    except ModuleNotFoundError as error:
        raise InputError("MLflow is not installed: pip install mlflow, or logger=csv") from error
    except Exception as error:
        if not _is_mlflow(error):
            raise
        raise InputError(
            f"MLflow cannot use {workspace.tracking_uri}: {str(error).splitlines()[0]}; set "
            "MLFLOW_TRACKING_URI to another, or train with logger=csv"
        ) from error


def _check_answers(uri: str) -> None:
    """Raise InputError where nobody answers at a server's address; MLflow tries for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWERS_WITHIN):
            pass
    except HTTPError:
        pass  # somebody is there, who may want a key that MLflow has
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # somebody is there, whom MLflow may be set to trust
        raise InputError(
            f"no MLflow server answers at {uri} ({error}); start it, set MLFLOW_TRACKING_URI to "
            "another, or train with logger=csv"
        ) from error


def _is_mlflow(error: BaseException) -> bool:
    """Whether an error is MLflow's own, or of a store or server that it speaks with."""
    return type(error).__module__.split(".")[0] in ("mlflow", "requests", "urllib3", "sqlalchemy")


def _parameters(config: DictConfig) -> dict[str, Any]:
    """Return what may change the result as `group/name`, each group as `group`: `loss: bce`."""
    left_out = OF_RETRIEVAL if config.get("examples") else OF_RANKING
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    flat = flatten({str(k): v for k, v in values.items() if k not in (*BESIDE, *left_out)})
    named = {k.removesuffix("/_target_"): v for k, v in flat.items() if "_partial_" not in k}
    return {k: v.rsplit(".", 1)[-1] if f"{k}/_target_" in flat else v for k, v in named.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, names joined by slashes.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and bool(value)
        flat |= flatten(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return flat


def _tags(config: DictConfig) -> dict[str, str]:
    tags = {
        "model": str(config.model._target_).rsplit(".", 1)[-1],
        "split": str(config.split.rule),
        "torch": torch.__version__,
        "device": _device(),
    }
    commit, sweep = _git_commit(), _sweep()
    tags |= {"mlflow.source.git.commit": commit} if commit else {}
    return tags | ({"sweep": sweep} if sweep else {})


def _sweep() -> str | None:
    """Return the folder of the multirun that this training is a point of, or None."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir).name


def _parents(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Return tags that tell which runs a continued one comes from.

    >>> _parents({"parent": {"name": "b", "mlflow_run_id": None}, "chain": ["a", "b"]})
    {'parent_run': 'b', 'chain': 'a > b', 'generation': '2'}
    """
    if "parent" not in lineage:
        return {}
    parent, chain = lineage["parent"], lineage["chain"]
    tags = {"parent_run": parent["name"], "parent_run_id": parent["mlflow_run_id"]}
    tags |= {"chain": " > ".join(chain), "generation": str(len(chain))}
    return {name: value for name, value in tags.items() if value}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _git_commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except OSError:
        return None
    return answer.stdout.strip() or None
