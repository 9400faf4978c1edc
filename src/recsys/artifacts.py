"""Datasets, runs and bundles on disk: written whole or not at all, hashed, verified, versioned."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recsys import __version__
from recsys.schema import InputError

MANIFEST = "manifest.json"
LAST = Path("checkpoints/last.ckpt")
"""In a run: where its training goes on from."""
SCHEMA_VERSIONS = {"dataset": 2, "run": 1, "bundle": 1, "recommendations": 1}
"""Version of each kind of directory; another version is refused, not guessed at."""
MAKE_AGAIN = {
    "dataset": "recsys prepare",
    "run": "recsys train",
    "bundle": "recsys export",
    "recommendations": "recsys recommend --all-users",
}


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path` when the block ends well, else is gone.

    An existing `path` is replaced only at that moment. An OSError (a full disk) passes through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        replace(scratch, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{path}: no space left on the disk; nothing was written. Free some, or set "
            "RECSYS_HOME to a larger disk"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace(scratch: Path, path: Path) -> None:
    """Put the finished directory `scratch` in the place of `path`."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(directory: Path, kind: str, **facts: Any) -> dict[str, Any]:
    """Write `manifest.json` over all files now in `directory`, with size and SHA-256 of each."""
    files = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSIONS[kind],
        "recsys_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "files": files,
        "fingerprint": fingerprint({name: entry["sha256"] for name, entry in files.items()}),
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """Return the manifest of a `kind` directory, or raise InputError saying what is wrong."""
    path = directory / MANIFEST
    again = f"make it again with `{MAKE_AGAIN[kind]}`"
    if not path.is_file():
        unfinished = kind == "run" and (directory / LAST).is_file()
        next_ = f"go on with `recsys train resume={directory.name}`" if unfinished else again
        met = "not finished" if unfinished else f"not a {kind}"
        raise InputError(f"{directory}: {met}: no {MANIFEST} in it; {next_}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {again}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise InputError(f"{directory}: expected a {kind}, found a {found}")
    if manifest.get("schema_version") != SCHEMA_VERSIONS[kind]:
        raise InputError(
            f"{directory}: {kind} of schema version {manifest.get('schema_version')}; this recsys "
            f"{__version__} reads version {SCHEMA_VERSIONS[kind]}; {again}"
        )
    return manifest


def verify(directory: Path, manifest: dict[str, Any]) -> None:
    """Check size and SHA-256 of every file that the manifest names; raise InputError naming one."""
    for name, entry in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{directory}: file {name} is missing; copy it again from its source")
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise InputError(f"{file}: content differs from its manifest; copy it from its source")


def sha256(file: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, read in bounded memory."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(facts: Any) -> str:
    """Return 16 hexadecimal digits that stand for a JSON-able value.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a neighbour file, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
    scratch.replace(path)


class Workspace:
    """The directory that holds every dataset, run and bundle, and what `latest` means."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root or os.environ.get("RECSYS_HOME") or "workspace").resolve()

    def folder(self, kind: str) -> Path:
        """Return the folder of all things of a kind: `dataset`, `run` or `bundle`."""
        return self.root / f"{kind}s"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: MLFLOW_TRACKING_URI, or SQLite in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def artifact_location(self) -> str | None:
        """Where MLflow's files go: into the workspace, or where its server says (None)."""
        served = self.tracking_uri.startswith(("http://", "https://"))
        return None if served else (self.root / "mlartifacts").as_uri()

    def find(self, kind: str, name: str = "latest") -> Path:
        """Return the directory named `latest`, by its name here, or by its path."""
        for path in (self.folder(kind) / name, Path(name)):
            if name and path.is_dir():
                return path.resolve()
        known = sorted(p.name for p in self.folder(kind).glob("[!.]*") if not p.is_symlink())
        met = f"there is no {kind} yet" if name == "latest" else f"no {kind} named {name!r}"
        there = f"; there is: {', '.join(known[-5:])}" if known else ""
        raise InputError(f"{met} in {self.folder(kind)}{there}; make one with `{MAKE_AGAIN[kind]}`")

    def mark_latest(self, kind: str, path: Path) -> None:
        """Make `latest` mean `path` from now on."""
        link = self.folder(kind) / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path, self.folder(kind)))
        link.replace(self.folder(kind) / "latest")
