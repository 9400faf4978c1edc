"""`recsys recommend`: one answer in the terminal, or everyone's in a folder; with no server."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving.batch import Advance, Batch, run
from recsys.serving.batch_settings import BatchSettings, Shard
from recsys.serving.engine import Engine
from recsys.serving.explain_messages import MAX_EXPLAINED, ExplainRequest
from recsys.serving.messages import Person, RecommendRequest, converted

LINES = 20
"""So many lines say how far it is where there is no terminal to draw a bar on."""


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
    engine = Engine.load(path)
    answer: dict[str, Any] = msgspec.to_builtins(engine.recommend([request])[0])
    if arguments.why and answer["items"]:
        ids = [item["item_id"] for item in answer["items"]]
        why = msgspec.to_builtins(engine.explain(why_of(request, ids, arguments.why)))
        told = {item.pop("item_id"): item for item in why["items"]}
        answer["items"] = [told[item["item_id"]] | item for item in answer["items"]]
    return answer, path


def why_of(request: RecommendRequest, item_ids: list[str], by: Any) -> ExplainRequest:
    """Return what asks why a request was answered with some items; raise InputError for many."""
    if len(item_ids) > MAX_EXPLAINED:
        raise InputError(
            f"--why explains {MAX_EXPLAINED} items at most, not {len(item_ids)}; lower --top-k"
        )
    person = {name: getattr(request, name) for name in Person.__struct_fields__}
    return ExplainRequest(items=item_ids, by=by, **person)


def batch_of(arguments: Namespace, workspace: Workspace) -> Batch:
    """Open the batch that a command's flags make; raise InputError where they do not suit it."""
    if arguments.user or arguments.history:
        raise InputError(
            "--all-users answers everyone by what is stored of them; leave out --user and "
            "--history, or name some users in a file: --users FILE"
        )
    if arguments.why:
        raise InputError("--why has no effect with --all-users; ask for one person: --user USER_ID")
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
    answered = 0 if settings.finish else _run(batch, shard, console)
    if not settings.finish and (left := len(batch.missing())):
        made = f"parts of {answered:,} users; {left:,} of {batch.parts:,} are others' to write"
        return made, batch.out, _finish(), _facts(batch, {"missing": left})
    manifest = batch.finish()
    for line in _notes(manifest):
        console.print(line)
    made = f"recommendations for {manifest['users']:,} users ({answered:,} of them now)"
    return made, batch.out, _load(batch.out), _facts(batch, manifest)


def _run(batch: Batch, shard: Shard, console: Console) -> int:
    """Write a shard's missing parts, and show how far it is; return how many people's."""
    users = sum(len(batch.places(part)) for part in batch.missing(shard))
    with progress(users, console) as advance:
        run(batch, shard, advance)
    return users


class Rate(ProgressColumn):
    """People a second since this process began, and the time left at that rate."""

    def render(self, task: Task) -> Text:
        """Return it as text."""
        rate = max(task.completed / max(task.elapsed or 0.0, 1e-9), 1e-9)
        left = round(((task.total or 0) - task.completed) / rate)
        return Text(f"{rate:,.0f} users/s, {timedelta(seconds=left)} left")


@contextmanager
def progress(users: int, console: Console) -> Iterator[Advance]:
    """Show how far it is: a bar on a terminal, elsewhere a line at each twentieth."""
    columns = TextColumn("{task.completed:,.0f} of {task.total:,.0f} users"), BarColumn(), Rate()
    lock = Lock()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        bar.add_task("", total=users)
        task = bar.tasks[0]

        def advance(count: int) -> None:
            with lock:
                before = task.completed
                bar.advance(task.id, count)
                if bar.disable and before * LINES // users < task.completed * LINES // users:
                    done = f"{task.completed:,.0f} of {users:,} users"
                    console.print(f"{done}, {columns[2].render(task)}")

        yield advance


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
    """Print an answer's items with their titles and scores, and why, where that is told."""
    table = Table(title=f"{title} ({answer['source']}, {answer['bundle']})")
    extra = [c for c in ("title", "category") if any(c in item for item in answer["items"])]
    why = any("reasons" in item for item in answer["items"])
    for column in ("item_id", *extra, "score"):
        table.add_column(column, justify="right" if column == "score" else "left")
    if why:
        table.add_column("because of (the score without it would be less by)")
    for item in answer["items"]:
        cells = [str(item.get(column, "")) for column in extra]
        cells += [f"{item['score']:.3f}", *([because(item)] if why else [])]
        table.add_row(item["item_id"], *cells)
    Console().print(table)
    if ignored := answer.get("ignored"):
        Console().print(f"Not known and ignored: {', '.join(ignored['first_items'])}")


def because(item: dict[str, Any]) -> str:
    """Return an explained item's reasons and context in words.

    >>> reason = {"name": "i7", "events": 2, "event_types": ["view", "cart"], "effect": 0.5}
    >>> because({"reasons": [reason], "context": {"device": -0.25}})
    'i7 (view, cart) 0.500; device -0.250'
    """
    told = [
        (f"{r['name']} ({', '.join(r['event_types'])})", r.get("effect")) for r in item["reasons"]
    ]
    told += item.get("context", {}).items()
    return "; ".join(name if e is None else f"{name} {e:.3f}" for name, e in told)
