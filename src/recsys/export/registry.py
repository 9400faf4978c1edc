"""Bundles in MLflow's model registry: put one there, and find it again by name and alias."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys import __version__
from recsys.artifacts import Workspace, writing
from recsys.index.bundle import Bundle
from recsys.schema import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHAMPION = "champion"
SCHEME = "models:/"
ARTIFACT = "bundle"
EXPERIMENT = "recsys-bundles"
FINGERPRINT, VERSION = "recsys.fingerprint", "recsys.bundle"
"""Tags of a registered version: they say which bundle directory it is a copy of."""
_PLAIN = re.compile(r"[^'\"`\\]+")
"""Names that a search of MLflow's can quote."""


def register(bundle: Path, workspace: Workspace, name: str, promote: bool = False) -> str:
    """Log a bundle as an MLflow pyfunc model and register it; return its version.

    It goes to the MLflow run that trained it where that is in this store, else to a run of its
    own. `promote` points the alias `champion` at it. Raises InputError where the bundle is damaged.
    """
    opened = Bundle.open(bundle)
    with _store(workspace) as client, _run(client, opened, workspace):
        version = _log(opened, name)
        for key, value in _tags(opened).items():
            client.set_model_version_tag(name, version, key, value)
        if promote:
            client.set_registered_model_alias(name, CHAMPION, version)
    return version


def resolve(uri: str, workspace: Workspace) -> Path:
    """Return the verified bundle directory of `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    The workspace's own copy is used where it has the same content; otherwise the registered one
    is copied into the workspace. Raises InputError where there is no such model or version.
    """
    with _store(workspace) as client:
        version = _find(client, uri)
        local = _local_path(version, workspace)
        if not local.is_dir():
            _download(version, local)
    return Bundle.open(local).path


def version_of(uri: str, workspace: Workspace) -> str:
    """Return `models:/NAME/VERSION` of what an alias means now; raise InputError where nothing."""
    with _store(workspace) as client:
        version = _find(client, uri)
    return f"{SCHEME}{version.name}/{version.version}"


def promote(bundle: Path, workspace: Workspace, name: str) -> str:
    """Point the alias `champion` of model `name` at the version with this bundle's content.

    Returns that version; a bundle that is not registered under the name is, first. Raises
    InputError where the bundle is damaged.
    """
    opened = Bundle.open(bundle)
    with _store(workspace) as client:
        same = f"name='{name}' and tags.`{FINGERPRINT}`='{opened.manifest['fingerprint']}'"
        found = client.search_model_versions(same) if _PLAIN.fullmatch(name) else []
        if found:
            newest = str(max(int(version.version) for version in found))
            client.set_registered_model_alias(name, CHAMPION, newest)
            return newest
    return register(bundle, workspace, name, promote=True)


def signature() -> ModelSignature:
    """Return what the pyfunc model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    inputs = Schema(
        [
            ColSpec("string", "user_id", required=False),
            ColSpec(Array("string"), "history", required=False),
        ]
    )
    outputs = Schema([ColSpec(Array("string"), "item_ids"), ColSpec(Array("double"), "scores")])
    params = [ParamSpec("k", "long", 10), ParamSpec("exclude_seen", "boolean", True)]
    return ModelSignature(inputs=inputs, outputs=outputs, params=ParamSchema(params))


def _log(bundle: Bundle, name: str) -> str:
    import mlflow

    info = mlflow.pyfunc.log_model(
        name="bundle",
        python_model=str(Path(__file__).with_name("pyfunc.py")),
        artifacts={ARTIFACT: str(bundle.path)},
        signature=signature(),
        input_example=_example(bundle),
        pip_requirements=[f"recsys[serve]=={__version__}", "pandas"],
        registered_model_name=name,
        metadata=_tags(bundle),
    )
    return str(info.registered_model_version)


def _example(bundle: Bundle) -> Any:
    import pandas as pd

    tests = bundle.manifest["self_test"]
    history = tests[0]["history"] if tests else [str(bundle.item_ids[1])]
    return pd.DataFrame([{"history": history}])


def _tags(bundle: Bundle) -> dict[str, str]:
    return {VERSION: bundle.version, FINGERPRINT: str(bundle.manifest["fingerprint"])}


@contextlib.contextmanager
def _store(workspace: Workspace) -> Iterator[MlflowClient]:
    """Point MLflow at the workspace's store, and back where it was after the block."""
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise InputError(
            "the model registry needs MLflow: pip install 'recsys[train]', or name a bundle "
            "directory instead"
        ) from error
    workspace.root.mkdir(parents=True, exist_ok=True)
    uri = workspace.tracking_uri
    # MLflow keeps the address in the environment too, where Workspace would find it later.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with _quiet():
        mlflow.set_tracking_uri(uri)
        try:
            yield mlflow.MlflowClient(uri)
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


@contextlib.contextmanager
def _run(client: MlflowClient, bundle: Bundle, workspace: Workspace) -> Iterator[None]:
    """Make the run that trained the bundle the active one, or a new run."""
    import mlflow

    run_id = bundle.manifest.get("mlflow_run_id")
    if run_id and _exists(client, run_id):
        with mlflow.start_run(run_id=run_id):
            yield
        return
    found = client.get_experiment_by_name(EXPERIMENT)
    experiment = (
        found.experiment_id
        if found
        else client.create_experiment(EXPERIMENT, artifact_location=workspace.artifact_location)
    )
    with mlflow.start_run(experiment_id=experiment, run_name=bundle.version):
        yield


def _exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) is not None
    except MlflowException:
        return False


def _find(client: MlflowClient, uri: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    name, alias, version = _parsed(uri)
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise InputError(f"{uri}: {_known(client, name)}") from error


def _parsed(uri: str) -> tuple[str, str, str]:
    """Split a model URI into name, alias and version, one of the last two empty.

    >>> _parsed("models:/shop@champion"), _parsed("models:/shop/3")
    (('shop', 'champion', ''), ('shop', '', '3'))
    """
    name, at, alias = uri.removeprefix(SCHEME).partition("@")
    version = ""
    if not at:
        name, _, version = name.rpartition("/")
    if not uri.startswith(SCHEME) or not name or not (alias or version.isdigit()):
        raise InputError(f"{uri!r}: expected {SCHEME}NAME/VERSION or {SCHEME}NAME@ALIAS")
    return name, alias, version


def _known(client: MlflowClient, name: str) -> str:
    models = {model.name: model for model in client.search_registered_models()}
    make = "make one with `recsys export registry.name=NAME`"
    if name not in models:
        there = f"; there is: {', '.join(models)}" if models else ""
        return f"no model named {name!r} is registered{there}; {make}"
    versions = [str(v.version) for v in client.search_model_versions(f"name='{name}'")]
    aliases = ", ".join(models[name].aliases) or "none"
    return f"no such version; {name} has versions {', '.join(versions)} and aliases {aliases}"


def _local_path(version: ModelVersion, workspace: Workspace) -> Path:
    """Return where this version is, or is to be: never over another bundle of the same name."""
    name, fingerprint = (Path(version.tags.get(tag, "")).name for tag in (VERSION, FINGERPRINT))
    if not name or not fingerprint:
        raise InputError(
            f"{SCHEME}{version.name}/{version.version} was not registered by recsys; register a "
            "bundle with `recsys export registry.name=NAME`"
        )
    path = workspace.folder("bundle") / name
    same = not path.exists() or _fingerprint(path) == fingerprint
    return path if same else path.with_name(f"{name}-{fingerprint}")


def _fingerprint(path: Path) -> str | None:
    try:
        return str(Bundle.open(path, verify=False).manifest["fingerprint"])
    except InputError:
        return None


def _download(version: ModelVersion, target: Path) -> None:
    import mlflow

    source = f"{SCHEME}{version.name}/{version.version}"
    with writing(target) as scratch:
        model = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(scratch / "model")))
        found = _bundle_in(model)
        for entry in found.iterdir():
            shutil.move(entry, scratch / entry.name)
        shutil.rmtree(scratch / "model")


def _bundle_in(model: Path) -> Path:
    """Return the bundle's directory within a downloaded model."""
    for manifest in sorted((model / "artifacts").rglob("manifest.json")):
        if json.loads(manifest.read_text()).get("kind") == "bundle":
            return manifest.parent
    raise InputError(f"{model}: a registered model, but not a recsys bundle")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's own lines off the terminal; the caller says what was made."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # Recorded and dropped: MLflow sets its own filters, which would undo one set here.
        with warnings.catch_warnings(record=True), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
