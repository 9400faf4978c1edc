"""Dockerfile.cuda, what it installs, and the check that runs its steps."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from linting import lint
from recsys import __version__

CHECKOUT = Path(__file__).parents[2]
sys.path.append(str(CHECKOUT / "scripts"))

import check_image  # noqa: E402

FILE = CHECKOUT / "Dockerfile.cuda"
ARGUMENTS, STAGES = check_image.parse(FILE.read_text(encoding="utf-8"))
IMAGES = ("train", "serve", "serve-cuda")
EXTRAS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
TWINS = (("faiss-cpu", "faiss-gpu-cuvs"), ("onnxruntime", "onnxruntime-gpu"))
"""Distributions that bring the same module."""


def closure(extra: str) -> Iterator[Requirement]:
    """Yield every requirement of an extra, and of the extras that it names."""
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "recsys":
            for other in requirement.extras:
                yield from closure(other)
        else:
            yield requirement


def installed(stage: str) -> tuple[list[str], Path]:
    """Return the extras that a stage installs and the versions that it keeps to."""
    (extras,) = (rest for word, rest in STAGES[stage].steps if word == "ARG")
    (path,) = re.findall(r"-c /(\S+)", " ".join(r for w, r in STAGES[stage].steps if w == "RUN"))
    return extras.removeprefix("EXTRAS=").split(","), CHECKOUT / path


def pins(file: Path) -> dict[str, list[Requirement]]:
    """Return the pinned versions of a file by name, several where Python's version decides."""
    found: dict[str, list[Requirement]] = {}
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def last(stage: str, word: str) -> str | None:
    """Return a stage's last instruction of a kind, or that of what it starts from."""
    there = [rest for met, rest in STAGES[stage].steps if met == word]
    if there:
        return there[-1]
    return last(STAGES[stage].base, word) if STAGES[stage].base in STAGES else None


def test_hadolint() -> None:
    lint("hadolint", FILE)


def test_the_check_reads_its_own_examples() -> None:
    assert doctest.testmod(check_image).failed == 0
    assert doctest.testmod(check_image).attempted >= 3


def test_bases_are_pinned() -> None:
    bases = [check_image.filled(one.base, ARGUMENTS) for one in STAGES.values()]
    for base in (base for base in bases if base not in STAGES):
        assert re.search(r":\d+\.\d+\.\d+-", base), base


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_recsys_as_a_plain_user(image: str) -> None:
    workload = next(
        yaml.safe_load_all((CHECKOUT / "serving/kubernetes/statefulset.yaml").read_text())
    )
    user = workload["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert last(image, "USER") == f"{user}:{user}"
    assert last(image, "ENTRYPOINT") == '["recsys"]'
    assert ("/readyz" in (last(image, "HEALTHCHECK") or "")) == image.startswith("serve")


def test_sources_stay_behind() -> None:
    for image in IMAGES:
        stage = STAGES[image]
        while stage.base in STAGES:
            assert not [rest for word, rest in stage.steps if word in ("COPY", "ADD")]
            stage = STAGES[stage.base]


def test_what_is_copied_is_let_through() -> None:
    let = (CHECKOUT / ".dockerignore").read_text().split()
    text = FILE.read_text()
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)).split()
    bound = re.findall(r"type=bind,source=(\w+)", text)
    for name in (*copied, *bound):
        assert f"!{name}" in let
        assert (CHECKOUT / name).exists()
    assert {line[1:] for line in let if line.startswith("!")} == {*copied, *bound}


@pytest.mark.parametrize("image", IMAGES)
def test_every_requirement_is_pinned(image: str) -> None:
    extras, file = installed(image)
    pinned = pins(file)
    for extra in extras:
        for requirement in closure(extra):
            there = pinned.get(canonicalize_name(requirement.name))
            assert there, f"{requirement.name}: make constraints"
            for one in there:
                (version,) = (spec.version for spec in one.specifier)
                assert requirement.specifier.contains(version), f"{one}: make constraints"


def test_a_server_has_no_torch() -> None:
    for image in ("serve", "serve-cuda"):
        assert "torch" not in pins(installed(image)[1])
    assert "torch" in pins(installed("train")[1])


def test_no_module_comes_from_two_distributions() -> None:
    sets = [[extra] for extra in EXTRAS] + [installed(image)[0] for image in IMAGES]
    for extras, twins in product(sets, TWINS):
        names = {requirement.name for extra in extras for requirement in closure(extra)}
        assert not names.issuperset(twins), extras


def test_versions_agree() -> None:
    assert f'org.opencontainers.image.version="{__version__}"' in FILE.read_text()
    named = [FILE, *CHECKOUT.glob("serving/**/*.yaml"), *CHECKOUT.glob("training/**/*.yaml")]
    tags = [
        tag
        for file in named
        for tag in re.findall(r"recsys-(?:train|serve)\S*?:(\d\S*)", file.read_text())
    ]
    assert len(tags) >= 6
    assert set(tags) == {__version__}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts need root on Linux")
def test_steps_run_one_by_one() -> None:
    done = subprocess.run([sys.executable, CHECKOUT / "scripts" / "check_image.py"])
    assert done.returncode == 0
