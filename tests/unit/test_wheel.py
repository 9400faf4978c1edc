"""The wheel carries its configs and nothing that belongs to a checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from recsys.config import config_dir

ROOT = Path(__file__).parents[2]


def test_wheel_holds_the_package_and_every_config(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {p.relative_to(config_dir()).as_posix() for p in config_dir().rglob("*.yaml")}
    assert {f"recsys/configs/{name}" for name in configs} <= names
    assert "recsys/cli.py" in names
    assert all(name.startswith(("recsys/", "recsys-")) for name in names)
