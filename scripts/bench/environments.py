"""A virtual environment for each library, made once and kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

READY = "installed.txt"


@dataclass(frozen=True)
class Library:
    """What to install, and the driver that measures it with each loss it has."""

    name: str
    requirements: tuple[str, ...]
    driver: str
    losses: tuple[str, ...] = ("full_softmax", "sampled_softmax")


LIBRARIES = (
    Library("RecTools", ("rectools[torch]==0.19.0",), "rectools_sasrec.py"),
    Library(
        "RecBole",
        ("recbole==1.2.1", "numpy<2", "pandas<2.2"),
        "recbole_sasrec.py",
        # Its SASRec has cross-entropy over all items, or BPR with one negative.
        ("full_softmax",),
    ),
    Library("RePlay", ("replay-rec[torch]==0.22.0",), "replay_sasrec.py"),
)


class NotInstalled(Exception):
    """A library could not be installed; the message says why."""


def python_of(library: Library, torch: str, folder: Path) -> Path:
    """Return the interpreter of the library's environment, made here if it is not there."""
    root = folder / library.name.lower()
    python, ready = root / "bin" / "python", root / READY
    wanted = "\n".join([torch, *library.requirements])
    if ready.is_file() and ready.read_text() == wanted:
        return python
    shutil.rmtree(root, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(root)])
    # One command, so that no library drags in another torch.
    run([str(python), "-m", "pip", "install", "--quiet", torch, *library.requirements])
    ready.write_text(wanted)
    return python


def run(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if "ERROR" in line]
        reason = " ".join(said[-2:]) or answer.stderr.strip()[-300:]
        raise NotInstalled(f"not installed: {reason}")
