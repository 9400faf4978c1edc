"""`recsys recommend`: one answer in the terminal, or everyone's in a folder; with no server."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving.batch import Batch, run
from recsys.serving.batch_settings import BatchSettings, Shard
from recsys.serving.engine import Engine
from recsys.serving.messages import RecommendRequest, converted


def request_of(arguments: Namespace) -> RecommendRequest:
    """Return the request that a command's flags make; raise InputError where one is wrong."""
    recency = arguments.recency
    given = {
        "user_id": arguments.user,
        "history": arguments.history,
        "k": arguments.k,
        "exclude_seen": not arguments.keep_seen,
        "exclude_items": arguments.exclude_items,
        "allow_categories": arguments.allow_categories,
        "deny_categories": arguments.deny_categories,
        "weights": None if recency is None else {"recency": recency},
        "now": None if arguments.now is None else _value(arguments.now),
        "context": dict(map(_named, arguments.context or ())),
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return converted(chosen, RecommendRequest)


def _named(word: str) -> tuple[str, Any]:
    """Return what `NAME=VALUE` says; raise InputError.

    >>> _named("device=phone"), _named("budget=5")
    (('device', 'phone'), ('budget', 5))
    """
    name, equals, text = word.partition("=")
    if not name or not equals:
        raise InputError(f"--context {word}: expected NAME=VALUE, such as device=phone")
    return name, _value(text)


def _value(text: str) -> Any:
    """Return a number, a truth value or a list that is written as in JSON; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _batch_settings(arguments: Namespace) -> dict[str, Any]:
    given = {field.name: getattr(arguments, field.name) for field in fields(BatchSettings)}
    return {name: value for name, value in given.items() if value is not None}


def ask(arguments: Namespace, workspace: Workspace) -> tuple[dict[str, Any], Path]:
    """Answer one request as the server would; return the answer as plain values, and the bundle.

    Raises InputError where the bundle or the request is wrong.
    """
    for name in _batch_settings(arguments):
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} has no effect on one answer; add --all-users, or leave it out")
    request, path = request_of(arguments), workspace.find("bundle", arguments.bundle)
    return msgspec.to_builtins(Engine.load(path).recommend([request])[0]), path


def batch_of(arguments: Namespace, workspace: Workspace) -> Batch:
    """Open the batch that a command's flags make; raise InputError where they do not suit it."""
    if arguments.user or arguments.history:
        raise InputError(
            "--all-users answers everyone by what is stored of them; leave out --user and "
            "--history, or name some users in a file: --users FILE"
        )
    request, settings = request_of(arguments), BatchSettings(**_batch_settings(arguments))
    path = workspace.find("bundle", arguments.bundle)
    return Batch.open(path, request, settings, workspace)


def answer_all(batch: Batch) -> tuple[str, Path, str, dict[str, Any]]:
    """Write what is missing; return what was made, where, the next command, and the facts."""
    settings, shard = batch.settings, Shard.of(batch.settings.shard)
    console = Console(stderr=True)
    if batch.whole:
        manifest = batch.checked()
        return "nothing: it was whole", batch.out, _load(batch.out), _facts(batch, manifest)
    there = batch.parts - len(batch.missing())
    console.print(f"{len(batch.people):,} users in {batch.parts:,} parts, {there:,} of them there")
    answered = 0 if settings.finish else run(batch, shard)
    if not settings.finish and (left := len(batch.missing())):
        made = f"parts of {answered:,} users; {left:,} of {batch.parts:,} are others' to write"
        return made, batch.out, _finish(), _facts(batch, {"missing": left})
    manifest = batch.finish()
    for line in _notes(manifest):
        console.print(line)
    made = f"recommendations for {manifest['users']:,} users ({answered:,} of them now)"
    return made, batch.out, _load(batch.out), _facts(batch, manifest)


def _facts(batch: Batch, more: dict[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in more.items() if name != "files"}
    return {"recommendations": str(batch.out), "users": len(batch.people), **shown}


def _notes(manifest: dict[str, Any]) -> list[str]:
    """Return in words what a reader of the files might wonder about."""
    people = manifest["people"]
    notes = []
    if count := manifest["popular"]:
        notes.append(f"{count:,} users without a history got popular items (source: popular)")
    if unknown := people.get("unknown_users", {}).get("count"):
        done = "left out" if people["skip_unknown"] else "popular items"
        named = ", ".join(people["unknown_users"]["first"])
        notes.append(f"{unknown:,} users in the file are not known ({done}), such as {named}")
    if events := manifest["unknown_events"]:
        items = people["unknown_items"]
        notes.append(f"{events:,} events left out: of {items:,} items that the bundle lacks")
    if failed := manifest["ranker_failed"]:
        notes.append(f"{failed:,} answers are as retrieval ordered them: the ranker failed")
    return notes


def _load(out: Path) -> str:
    return f"duckdb -c \"FROM '{out}/*.parquet' LIMIT 5\""


def _finish() -> str:
    typed = [word for word in sys.argv[1:] if word != "--json"]
    return shlex.join(["recsys", *typed, "--finish"]) + "   (when the others are done)"


def answer_table(answer: dict[str, Any], title: str = "Recommended") -> None:
    """Print an answer's items with their titles and scores."""
    table = Table(title=f"{title} ({answer['source']}, {answer['bundle']})")
    extra = [c for c in ("title", "category") if any(c in item for item in answer["items"])]
    for column in ("item_id", *extra, "score"):
        table.add_column(column, justify="right" if column == "score" else "left")
    for item in answer["items"]:
        cells = (str(item.get(column, "")) for column in extra)
        table.add_row(item["item_id"], *cells, f"{item['score']:.3f}")
    Console().print(table)
    if ignored := answer.get("ignored"):
        Console().print(f"Not known and ignored: {', '.join(ignored['first_items'])}")
