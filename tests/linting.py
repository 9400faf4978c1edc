"""Linters that come with the extra `dev`, or are the system's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def lint(tool: str, *arguments: str | Path, text: str | None = None) -> None:
    """Run a checker, which must find nothing; skip where it is not installed."""
    beside = Path(sys.executable).parent
    found = shutil.which(tool, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([found, *arguments], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
