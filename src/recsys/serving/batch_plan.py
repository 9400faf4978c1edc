"""What the files of a batch follow from, kept beside them: whoever goes on does the same."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from recsys import __version__
from recsys.artifacts import write_json
from recsys.schema import InputError
from recsys.serving.batch_settings import BatchSettings
from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest, milliseconds
from recsys.serving.people import People
from recsys.serving.state import now_ms

PLAN = "plan.json"
OF_FILES = ("exact", "part_users", "batch")
"""Settings that the content of a part depends on."""
Json = dict[str, Any]


def planned(
    engine: Engine, people: People, request: RecommendRequest, settings: BatchSettings
) -> Json:
    """Return all that the content of the parts follows from, as plain values.

    Raises InputError where the bundle cannot do what is asked.
    """
    _check(engine, request, settings)
    given = now_ms() if request.now is None else milliseconds(request.now)
    kept = asdict(settings)
    manifest = engine.bundle.manifest
    return {
        "bundle": {"version": engine.version, "fingerprint": manifest["fingerprint"]},
        "people": {**people.facts, "count": len(people)},
        "request": {"k": request.k, **msgspec.to_builtins(request), "now": given},
        "settings": {**{name: kept[name] for name in OF_FILES}, "ranked": bool(engine.ranker)},
        "made_by": __version__,
    }


def _check(engine: Engine, request: RecommendRequest, settings: BatchSettings) -> None:
    if request.k > engine.bundle.num_items:
        raise InputError(
            f"top-k={request.k} is more than the {engine.bundle.num_items} items of bundle "
            f"{engine.version}; give at most that"
        )
    if settings.rank and engine.ranker is None:
        raise InputError(
            f"--rank has no effect on bundle {engine.version}: it has no second stage; leave it "
            "out, or export a ranker's run"
        )


def agreed(out: Path, plan: Json, *, own_now: bool) -> Json:
    """Put the plan into the folder, or return the one that is there already.

    Of several processes that begin at once the first one's counts, and its moment, where this one
    has no moment of its own. Raises InputError where the folder was begun otherwise, or holds other
    files.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / PLAN
    if not file.is_file():
        _begin(out, plan)
    there: Json = json.loads(file.read_bytes())
    if not own_now:
        plan["request"]["now"] = there["request"]["now"]
    if differing := [*_differing(there, plan)]:
        raise InputError(
            f"{out}: was begun with other settings: {'; '.join(differing)}; choose another --out, "
            "or delete that folder"
        )
    return there


def _begin(out: Path, plan: Json) -> None:
    others = {one.name for one in out.iterdir() if not one.name.startswith(".")}
    if others - {PLAN}:  # another process may have put its plan there just now
        raise InputError(
            f"{out}: holds other files, such as {min(others - {PLAN})}; expected a new folder, or "
            "one that this command has begun: choose another --out"
        )
    scratch = out / f".{PLAN}.{secrets.token_hex(4)}"
    write_json(scratch, plan)
    with suppress(FileExistsError):
        os.link(scratch, out / PLAN)
    scratch.unlink()


def _differing(there: Json, asked: Json) -> Iterator[str]:
    old, new = dict(_flat(there)), dict(_flat(asked))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield f"{name} was {_shown(old.get(name))}, now {_shown(new.get(name))}"


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)
