"""Say which bundle an MLflow alias means, line after line, for a process that stays without MLflow.

`python -m recsys.export.follow` reads one `models:/NAME@ALIAS` a line and answers each with one
line of JSON: `path`, `version` and `fingerprint` of the verified bundle, or `error`. It ends with
its input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from recsys.artifacts import Workspace
from recsys.export.registry import resolve, version_of
from recsys.index.bundle import Bundle
from recsys.schema import InputError


def answers(lines: Iterable[str], find: Callable[[str], dict[str, str]]) -> Iterator[str]:
    """Yield one line of JSON for each URI: what `find` found, or how it failed.

    >>> def find(uri): raise InputError(f"{uri}: no such model")
    >>> list(answers(["models:/shop@best"], find))
    ['{"error": "models:/shop@best: no such model"}']
    """
    for line in lines:
        uri = line.strip()
        try:
            yield json.dumps(find(uri))
        except InputError as error:
            yield json.dumps({"error": str(error)})
        except Exception as error:  # MLflow's store can fail in as many ways as there are stores
            yield json.dumps({"error": f"{uri}: {type(error).__name__}: {error}"})


class Finder:
    """Finds the bundle of an alias; a version that was verified once is not hashed again."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.known: dict[str, Path] = {}

    def __call__(self, uri: str) -> dict[str, str]:
        """Return path, version and fingerprint of the bundle; raise InputError without one."""
        version = version_of(uri, self.workspace)
        if not self.known.get(version, Path("-")).is_dir():
            self.known = {version: resolve(version, self.workspace)}
        return _described(self.known[version])


def _described(path: Path) -> dict[str, str]:
    bundle = Bundle.open(path, verify=False)
    fingerprint = str(bundle.manifest["fingerprint"])
    return {"path": str(bundle.path), "version": bundle.version, "fingerprint": fingerprint}


if __name__ == "__main__":
    for answer in answers(iter(sys.stdin.readline, ""), Finder(Workspace())):
        print(answer, flush=True)
