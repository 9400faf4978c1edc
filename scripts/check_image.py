"""Dockerfile.cuda without a container engine: its instructions, read from it and run in order.

Each stage is a copy-on-write view of this machine (overlayfs, chroot), so commands run as written,
as the user that the file names, and leave nothing behind. The base image alone is a stand-in: this
machine with the Python that --python names. Needs Linux, root, and what pip installs from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
DOCKERFILE = CHECKOUT / "Dockerfile.cuda"
IGNORE = CHECKOUT / ".dockerignore"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHOP = "data=synthetic data.source.num_users=60 data.source.num_items=60 split=temporal"
HEALTHY_WITHIN = 120
TINY = f"{SHOP} trainer.max_epochs=1 logger=csv evaluation.exclude_seen=false"


@dataclass(frozen=True)
class Stage:
    """One stage of the file: its name, what it starts from, and its instructions in order."""

    name: str
    base: str
    steps: tuple[tuple[str, str], ...]


def parse(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first FROM, and every stage by its name.

    >>> found = parse("ARG V=1\\nFROM a:${V} AS b\\nRUN x \\\\\\n  && y\\nFROM b AS c\\nUSER d")
    >>> found[0], found[1]["b"]
    ({'V': '1'}, Stage(name='b', base='a:${V}', steps=(('RUN', 'x && y'),)))
    """
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, re.sub(r"\\\n\s*", "", lines).splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = stage = Stage(name, base, ())
        elif not stages:
            name, _, arguments_value = rest.partition("=")
            arguments[name] = arguments_value
        else:
            stages[stage.name] = stage = replace(stage, steps=(*stage.steps, (word, rest)))
    return arguments, stages


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return a text with `$NAME` and `${NAME}` of the values put in.

    >>> filled("/opt/bin:$PATH ${NO}", {"PATH": "/bin"})
    '/opt/bin:/bin ${NO}'
    """
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda met: values.get(met[1] or met[2], met[0]), text)


@dataclass
class Image:
    """What a stage has become: the files that it adds, and the settings of its processes."""

    layer: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()

    def find(self, path: str) -> Path:
        """Return where a path of this image's own lies on this machine."""
        return self.layer / path.lstrip("/")

    def inside(self, command: Iterable[str], root: Path) -> list[str]:
        """Return the command line that runs `command` as this image says, where it is mounted."""
        home = "/root" if self.user == "0:0" else "/home/recsys"
        kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        env = [f"{k}={v}" for k, v in {**kept, "HOME": home, **self.env, **self.arguments}.items()]
        words = f"cd {self.workdir} && exec {shlex.join(command)}"
        chroot = ["chroot", f"--userspec={self.user}", str(root)]
        return [*chroot, "env", "-i", *env, "bash", "-c", words]

    def script(self, command: Iterable[str], binds: Mapping[str, Path], scratch: Path) -> list[str]:
        """Return the command line that mounts this image and folders, and runs `command`."""
        root, work = scratch / "root", scratch / "work"
        for folder in (root, work):
            folder.mkdir()
        options = f"lowerdir=/,upperdir={self.layer},workdir={work}"
        lines = [
            f"mount -t overlay overlay {root} -o {options}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
        ]
        for path, source in binds.items():
            lines += [f"mkdir -p {root}{path}", f"mount --bind {source} {root}{path}"]
        lines.append("exec " + shlex.join(self.inside(command, root)))
        return ["unshare", "--mount", "bash", "-ec", "\n".join(lines)]


class Builder:
    """Makes images of stages in a scratch folder."""

    def __init__(self, scratch: Path, build_arguments: Mapping[str, str]) -> None:
        self.scratch = scratch
        self.given = build_arguments
        self.globals, self.stages = parse(DOCKERFILE.read_text(encoding="utf-8"))
        self.context = self.folder("context")
        _copy_context(self.context)

    def folder(self, name: str) -> Path:
        """Return a new folder of the scratch folder."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))
        path.chmod(0o755)
        return path

    def build(self, name: str, python: Path, dry: bool = False) -> Image:
        """Run a stage's steps, and those of the stages that it starts from; print each."""
        stage = self.stages[name]
        if stage.base in self.stages:
            below = self.build(stage.base, python)
        else:
            print(f"  base  {filled(stage.base, self.globals)}: {python} in its place")
            below = Image(_stand_in(self.folder("base"), python))
        image = replace(below, layer=self.folder(name), env={**below.env}, arguments={})
        subprocess.run(["cp", "-a", f"{below.layer}/.", image.layer], check=True)
        for word, rest in stage.steps:
            self._step(image, word, rest, python, dry)
        return image

    def _step(self, image: Image, word: str, rest: str, python: Path, dry: bool) -> None:
        values = {**image.env, **image.arguments}
        if word == "RUN":
            self._run(image, rest, python, dry)
        elif word == "COPY":
            *names, target = rest.split()
            for name in names:
                _copy(self.context / name, image.find(image.workdir) / target)
        elif word == "ENV":
            pairs = (pair.partition("=") for pair in shlex.split(rest))
            image.env |= {key: filled(value, values) for key, _, value in pairs}
        elif word == "ARG":
            key, _, value = rest.partition("=")
            image.arguments[key] = self.given.get(key, value)
        elif word == "WORKDIR":
            image.workdir = rest
            image.find(rest).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            image.user = rest
        elif word in ("ENTRYPOINT", "CMD"):
            setattr(image, "command" if word == "CMD" else "entrypoint", tuple(json.loads(rest)))
        elif word == "HEALTHCHECK":
            image.health = tuple(json.loads(rest.partition("CMD ")[2]))
        elif word not in ("LABEL", "EXPOSE", "STOPSIGNAL"):
            raise SystemExit(f"{DOCKERFILE.name}: {word} is not understood here")

    def _run(self, image: Image, rest: str, python: Path, dry: bool) -> None:
        mounts, command = re.findall(r"--mount=(\S+)\s+", rest), re.sub(r"--mount=\S+\s+", "", rest)
        binds = {}
        for mount in (dict(pair.split("=") for pair in one.split(",")) for one in mounts):
            source = mount["source"]
            made = mount.get("from")
            place = self.made(made, python).find(source) if made else self.context / source
            binds[mount["target"]] = place
        if dry:
            command = command.replace("pip install", "pip install --dry-run")
        print(f"  run   {command}", flush=True)
        started = time.perf_counter()
        line = image.script(["sh", "-c", command], binds, self.folder("mount"))
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout[-3000:]}{done.stderr[-3000:]}\nfailed: {command}")
        print(f"        {time.perf_counter() - started:.0f} s", flush=True)

    def made(self, name: str, python: Path) -> Image:
        """Return a stage that others copy from, made once."""
        if name not in self.__dict__.setdefault("_made", {}):
            self._made[name] = self.build(name, python)
        return self._made[name]


def _copy_context(target: Path) -> None:
    """Copy what .dockerignore lets through: names after `!`, less what a later line shuts out."""
    lines = IGNORE.read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    shut = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    for name in (line[1:] for line in lines if line.startswith("!")):
        _copy(CHECKOUT / name, target / name, *shut)


def _copy(source: Path, target: Path, *shut: str) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*shut), dirs_exist_ok=True)
        return
    into = target / source.name if target.is_dir() else target
    into.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, into)


def _stand_in(layer: Path, python: Path) -> Path:
    """Make `python` and `pip` of a layer mean one interpreter of this machine, for any user."""
    folder = layer / "usr" / "local" / "bin"
    folder.mkdir(parents=True)
    for name, words in {"python": "", "python3": "", "pip": "-m pip"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {python} {words} "$@"\n')
        (folder / name).chmod(0o755)
    for parent in python.parents:
        if parent.stat().st_mode & 0o001 == 0:
            (layer / str(parent).lstrip("/")).mkdir(parents=True)
            (layer / str(parent).lstrip("/")).chmod(0o711)
    return layer


def ran(builder: Builder, image: Image, *command: str, wanted: int = 0) -> str:
    """Run a command in an image as its user; return what it printed."""
    line = image.script(command, {}, builder.folder("mount"))
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != wanted:
        raise SystemExit(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"  as {image.user}: {shlex.join(command)[:90]}", flush=True)
    return done.stdout


@contextmanager
def serving(builder: Builder, image: Image, bundles: Path) -> Iterator[Callable[[], bool]]:
    """Start an image as `docker run` would, with bundles mounted; stop it by SIGTERM at the end.

    Yields its health check. Raises SystemExit with the server's log where it fails.
    """
    folder = builder.folder("mount")
    command, log = (*image.entrypoint, *image.command), folder / "log"
    line = image.script(command, {"/workspace/bundles": bundles}, folder)
    with log.open("wb") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file)
    within = ["nsenter", "--mount", f"--target={process.pid}"]
    check = [*within, *image.inside(image.health, folder / "root")]

    def healthy() -> bool:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        return subprocess.run(check, capture_output=True).returncode == 0

    try:
        yield healthy
        process.terminate()
        if code := process.wait(timeout=60):
            raise SystemExit(f"the server ended with {code}")
    except BaseException as error:
        process.kill()
        raise SystemExit(f"{error}\n{log.read_text()[-3000:]}") from error


def check_wheel(builder: Builder, python: Path) -> None:
    """Build the wheel twice; both are the same to the byte."""
    hashes = set()
    for image in (builder.made("wheel", python), builder.build("wheel", python)):
        (wheel,) = image.find("/wheel").glob("*.whl")
        hashes.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(hashes) == 1, "two builds differ"
    print(f"ok    two builds of {wheel.name} are the same: sha256 {hashes.pop()[:16]}…")


def check_train(builder: Builder, python: Path) -> Path:
    """Train and export with the train image, outside any checkout; return its bundles."""
    image = builder.build("train", python)
    printed = ran(builder, image, *image.entrypoint, *image.command)
    assert "event log → dataset" in printed
    ran(builder, image, *image.entrypoint, "run", *TINY.split())
    print("ok    the train image prepares, trains and exports as a plain user")
    return image.find("/workspace/bundles")


def check_serve(builder: Builder, python: Path, bundles: Path) -> None:
    """Start the serve image on the bundle; its health check turns good, and it stops when told."""
    image = builder.build("serve", python)
    ran(builder, image, "python", "-c", "import torch", wanted=1)
    ran(builder, image, "sh", "-c", "test ! -w /opt/venv && test ! -e /build && ! ls /wheel/*")
    image.env["RECSYS_API_KEYS"] = "check read of-this-check-alone"  # or it refuses 0.0.0.0
    started = time.perf_counter()
    with serving(builder, image, bundles) as healthy:
        while not healthy():
            if time.perf_counter() - started > HEALTHY_WITHIN:
                raise SystemExit(f"not healthy after {HEALTHY_WITHIN} s")
            time.sleep(0.2)
        print(f"ok    healthy {time.perf_counter() - started:.1f} s after the start")
    size = sum(f.stat().st_size for f in image.find("/opt/venv").rglob("*") if f.is_file())
    print(f"ok    no torch, no sources, stopped by SIGTERM; {size / 2**20:.0f} MiB over the base")


def main() -> int:
    about = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    own = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    about.add_argument("--python", type=Path, default=own, help="in place of the base image's")
    help_ = "another for the train stage, where torch is to be had for that one alone"
    about.add_argument("--train-python", type=Path, help=help_)
    about.add_argument("--train-extras", default="train", help="of the train stage (train)")
    given = about.parse_args()
    if os.geteuid() or not shutil.which("unshare"):
        raise SystemExit("check_image.py mounts overlays: run it as root on Linux")
    scratch = Path(tempfile.mkdtemp(prefix="check-image-"))
    try:
        builder = Builder(scratch, {})
        check_wheel(builder, given.python)
        builder.given = {"EXTRAS": given.train_extras}
        bundles = check_train(builder, given.train_python or given.python)
        builder.given = {}
        check_serve(builder, given.python, bundles)
        builder.build("serve-cuda", given.python, dry=True)
        print("ok    serve-cuda's packages go together (pip's dry run; nothing was installed)")
    finally:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
