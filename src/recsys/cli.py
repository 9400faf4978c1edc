"""The command `recsys`: a verb for each arrow of the data's way, importing its room when called."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys import __version__
from recsys.artifacts import Workspace
from recsys.schema import InputError, suggestion

Arguments = argparse.Namespace


@dataclass(frozen=True)
class Outcome:
    """What a verb made, where, and the next command to type; `facts` go to `--json`."""

    made: str
    where: Path | str
    next: str
    facts: dict[str, Any] = field(default_factory=dict)


AGAIN = {
    "recommend": "the same command goes on",
    "train": "a training goes on with: recsys train resume=NAME",
    "run": "a training goes on with: recsys train resume=NAME",
}
"""What to type after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return 0, or 2 with a message where the user gave something wrong."""
    started = time.perf_counter()
    arguments, unknown = parser().parse_known_args(argv)
    unknown = _behind_options(arguments, unknown)
    if unknown:
        print(f"recsys {arguments.verb}: {_unknown(arguments, unknown[0])}", file=sys.stderr)
        return 2
    # Read when OpenMP is loaded. By default its threads spin for milliseconds while they wait and
    # starve each other where cores are shared: training was 16 times slower beside one other busy
    # process. A short spin costs a twentieth when alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    try:
        outcome = arguments.run(arguments)
    except KeyboardInterrupt as told:
        return _interrupted(arguments.verb, str(told))
    except Exception as error:
        if "Query interrupted" in str(error):  # what DuckDB makes of Ctrl-C
            return _interrupted(arguments.verb)
        message = explain(error)
        if message is None:
            raise
        print(f"recsys {arguments.verb}: {message}", file=sys.stderr)
        return 2
    if outcome is not None:
        report(outcome, time.perf_counter() - started, arguments.json)
    return 0


def _interrupted(verb: str, again: str = "") -> int:
    """Say what goes on after Ctrl-C; return the exit code."""
    again = again or AGAIN.get(verb, "the same command begins anew")
    print(f"\nrecsys: interrupted; {again}", file=sys.stderr)
    return 130


def _behind_options(arguments: Arguments, met: Sequence[str]) -> list[str]:
    """Take settings that stand behind an option, as in `--json seed=1`; return what is unknown."""
    if not hasattr(arguments, "words"):
        return list(met)
    arguments.words += [word for word in met if not word.startswith("-")]
    return [word for word in met if word.startswith("-")]


def _unknown(arguments: Arguments, met: str) -> str:
    known = [name for name in arguments.options if name.startswith("--")]
    hint = suggestion(met.partition("=")[0], known)
    return f"unknown argument {met!r}{hint}; recsys {arguments.verb} --help lists what there is"


def explain(error: BaseException) -> str | None:
    """Return the message for a mistake of the user's, or None for a mistake of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.filename or error}); free some and repeat"
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if type(error).__module__.split(".")[0] in ("hydra", "omegaconf"):
        from recsys.launch import explain_config

        return explain_config(error)
    return None


def report(outcome: Outcome, seconds: float, as_json: bool) -> None:
    """Say what was made, where, how long it took, and the next command; then the same as JSON."""
    print(f"\nMade   {outcome.made}")
    print(f"Where  {outcome.where}")
    print(f"Took   {seconds:.1f} s")
    print(f"Next   {outcome.next}", flush=True)
    if as_json:
        print(json.dumps({**outcome.facts, "seconds": round(seconds, 3)}), flush=True)


def prepare(arguments: Arguments) -> Outcome:
    """Event log → dataset."""
    from recsys import launch

    dataset = launch.prepare(arguments.words, Workspace())
    facts = {"dataset": str(dataset.path), "fingerprint": dataset.fingerprint}
    counts = {k: dataset.manifest[k] for k in ("num_users", "num_items", "num_events")}
    next_ = f"recsys train data.dataset={dataset.path.name}"
    return Outcome(f"dataset {dataset.path.name}", dataset.path, next_, facts | counts)


def train(arguments: Arguments) -> Outcome | None:
    """Dataset → run."""
    from recsys import launch

    if arguments.multirun:
        launch.sweep(arguments.words)
        return None
    from recsys.training.processes import joined

    flags = ["--json"] if arguments.json else []
    with joined():
        trained = launch.train(arguments.words, Workspace(), flags)
    return None if trained is None else _trained(trained)


def evaluate(arguments: Arguments) -> Outcome:
    """Run → metrics on the test part, beside the baselines."""
    from recsys import launch

    workspace = Workspace()
    return _trained(launch.evaluate(workspace.find("run", arguments.run_name), workspace))


def _trained(trained: Any) -> Outcome:
    name = trained.run.name
    facts = {"run": name, **trained.tested.metrics}
    verb = "export" if trained.tested.servable else "evaluate"
    return Outcome(f"run {name}", trained.run, f"recsys {verb} {name}", facts)


def compare(arguments: Arguments) -> Outcome:
    """Two runs → differences with paired bootstrap intervals."""
    from rich.console import Console

    from recsys.evaluation.shown import comparisons

    workspace = Workspace()
    left, right = (workspace.find("run", name) for name in (arguments.left, arguments.right))
    first, *shown = comparisons(left, right)
    for comparison in (first, *shown):
        Console().print(comparison.table())
    facts = first.as_dict() | ({"shown": shown[0].as_dict()} if shown else {})
    return Outcome(f"comparison of {left.name} and {right.name}", "above", "recsys ui", facts)


def export(arguments: Arguments) -> Outcome:
    """Run → bundle, registered in MLflow."""
    from recsys import launch

    names = [word for word in arguments.words if "=" not in word]
    if len(names) > 1:
        raise InputError(f"one run at a time; met {' '.join(names)}: recsys export {names[0]}")
    run = Workspace().find("run", names[0] if names else "latest")
    settings = [word for word in arguments.words if "=" in word]
    exported = launch.export(run, settings, Workspace(), promote=arguments.promote)
    facts = {"bundle": str(exported.bundle), "model": exported.model}
    registered = f", registered as {exported.model}" if exported.model else ""
    return Outcome(
        f"bundle {exported.bundle.name}{registered}", exported.bundle, "recsys serve", facts
    )


def run(arguments: Arguments) -> Outcome:
    """Prepare → train → evaluate → export."""
    from recsys import launch

    done = launch.run(arguments.words, Workspace())
    return Outcome(
        f"{len(done.trained)} run(s) and bundle {done.bundle.name}",
        done.bundle,
        "recsys serve",
        done.facts,
    )


def serve(arguments: Arguments) -> None:
    """Bundle → answers over HTTP."""
    from recsys.serving.http import serve as serve_http
    from recsys.serving.settings import ServeSettings

    names = ServeSettings.__dataclass_fields__
    given = {name: getattr(arguments, name) for name in names}
    chosen = {name: value for name, value in given.items() if value is not None}
    bundle = _bundle(chosen.get("bundle", ServeSettings.bundle))
    serve_http(ServeSettings(**{**chosen, "bundle": bundle}), Workspace())


def promote(arguments: Arguments) -> Outcome:
    """Bundle → champion: of a running server, or of MLflow's registry."""
    from recsys.serving.promote import find_bundle
    from recsys.serving.promote import promote as ask

    workspace = Workspace()
    bundle = find_bundle(_bundle(arguments.bundle), workspace)
    if arguments.server:
        facts = ask(str(bundle), arguments.server, why=arguments.why)
        look = f"curl -s {arguments.server}/admin/bundles"
        return Outcome(f"{bundle.name} the champion", arguments.server, look, facts)
    from recsys.export.registry import promote as set_alias

    version = set_alias(bundle, workspace, arguments.name)
    alias = f"models:/{arguments.name}@champion"
    made = f"version {version} of {arguments.name} the champion ({bundle.name})"
    return Outcome(made, alias, f"recsys serve --bundle {alias}", {"model": alias})


def recommend(arguments: Arguments) -> Outcome:
    """One answer in the terminal, or everyone's in a folder; no server."""
    from recsys.serving import terminal

    arguments.bundle = _bundle(arguments.bundle)
    if arguments.all_users:
        return Outcome(*terminal.answer_all(terminal.batch_of(arguments, Workspace())))
    answer, path = terminal.ask(arguments, Workspace())
    terminal.answer_table(answer)
    return Outcome(f"{len(answer['items'])} recommendations", path, "recsys serve", answer)


def _bundle(name: str) -> str:
    """Return a bundle's name or path; `models:/…` is fetched from MLflow's registry."""
    if not name.startswith("models:/"):
        return name
    from recsys.export.registry import resolve

    return str(resolve(name, Workspace()))


def ui(arguments: Arguments) -> None:
    """MLflow's pages over this workspace's store."""
    workspace = Workspace()
    workspace.root.mkdir(parents=True, exist_ok=True)
    url = f"http://{arguments.host}:{arguments.port}"
    print(f"MLflow on {workspace.tracking_uri}: {url}", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", workspace.tracking_uri]
    command += ["--host", arguments.host, "--port", str(arguments.port)]
    # This process becomes MLflow's, so that a signal to it reaches what serves.
    os.execv(sys.executable, command)


def parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    top = argparse.ArgumentParser(
        prog="recsys",
        description="From an event log to recommendations that follow people's interests.",
        epilog="Results live in ./workspace, or in RECSYS_HOME.",
    )
    top.add_argument("--version", action="version", version=f"recsys {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_launched, _add_with_run, _add_compare, _add_serving, _add_ui):
        add(verbs)
    return top


def _verb(verbs: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=about.replace("%%", "%")
    )
    verb.set_defaults(run=function, verb=name)
    verb.add_argument(
        "--json", action="store_true", help="last line: the result as one JSON object"
    )
    verb.set_defaults(options=verb._option_string_actions)
    return verb


def _add_launched(verbs: Any) -> None:
    kinds = {
        "prepare": (prepare, "event log → dataset"),
        "train": (train, "dataset → run; resume=RUN goes on with an interrupted one"),
        "run": (run, "prepare → train → evaluate → export"),
    }
    for name, (function, about) in kinds.items():
        verb = _verb(verbs, name, function, about)
        verb.epilog = "e.g. experiment=beauty data.path=amazon_beauty.txt trainer.max_epochs=5"
        _add_settings(verb)
        if name == "train":
            verb.add_argument("-m", "--multirun", action="store_true", help="sweep (Hydra)")


def _add_settings(verb: argparse.ArgumentParser) -> None:
    about = "settings, group=choice or key=value; see configs/"
    verb.add_argument("words", nargs="*", metavar="KEY=VALUE", help=about)


def _add_with_run(verbs: Any) -> None:
    verb = _verb(verbs, "evaluate", evaluate, "run → test metrics beside the baselines")
    verb.add_argument("run_name", nargs="?", default="latest", metavar="RUN")
    verb = _verb(verbs, "export", export, "run → bundle: ONNX, vectors, index, vocabularies")
    verb.add_argument("--promote", action="store_true", help="set the alias `champion` in MLflow")
    words = "[RUN] and settings, as in index=ivf_flat registry.name=shop"
    verb.add_argument("words", nargs="*", metavar="RUN | KEY=VALUE", help=words)


def _add_compare(verbs: Any) -> None:
    verb = _verb(verbs, "compare", compare, "two runs → differences with 95 %% intervals")
    verb.add_argument("left", metavar="RUN")
    verb.add_argument("right", metavar="RUN")


def _add_serving(verbs: Any) -> None:
    about = "name, path, or models:/shop@champion"
    from recsys.serving.batch_settings import BatchSettings
    from recsys.serving.settings import flags

    verb = _verb(verbs, "serve", serve, "bundle → answers over HTTP")
    for flag, options in flags():
        verb.add_argument(flag, **options)
    verb = _verb(verbs, "promote", promote, "bundle → champion, of a running server or in MLflow")
    about = "name or path of a bundle, or the run that it was made of (latest)"
    verb.add_argument("bundle", nargs="?", default="latest", metavar="BUNDLE", help=about)
    verb.add_argument("--server", metavar="URL", help="a running server (key: RECSYS_API_KEY)")
    verb.add_argument("--name", default="shop", help="registered model, without --server (shop)")
    verb.add_argument("--why", default="", help="kept in the server's record")
    verb = _verb(
        verbs, "recommend", recommend, "one answer in the terminal, or everyone's as Parquet"
    )
    unless = argparse.SUPPRESS
    verb.add_argument("bundle", nargs="?", default=unless, metavar="BUNDLE", help="as --bundle")
    verb.add_argument("--bundle", default="latest", help="name, path, or models:/shop@champion")
    verb.add_argument("--user", metavar="USER_ID")
    verb.add_argument("--history", nargs="+", metavar="ITEM_ID", help="oldest first")
    verb.add_argument("-k", "--top-k", dest="k", type=int, default=10, metavar="K")
    verb.add_argument("--keep-seen", action="store_true", help="may recommend seen items again")
    about = "0: what the history is about all along; 1: its newest turn; left out: the model's own"
    verb.add_argument("--recency", type=float, metavar="SHARE", help=about)
    about = "what the bundle's ranker reads of the request: device=phone, budget=5, …"
    verb.add_argument("--context", nargs="+", metavar="NAME=VALUE", help=about)
    about = "the moment to answer for, ISO 8601 or seconds since 1970; left out: this one"
    verb.add_argument("--now", metavar="TIME", help=about)
    about = (
        "and what of the path each item's score is owed to: by item (the default) or by category"
    )
    verb.add_argument("--why", nargs="?", const="item", choices=("item", "category"), help=about)
    for flag in ("--exclude-items", "--allow-categories", "--deny-categories"):
        verb.add_argument(flag, nargs="+", metavar="NAME")
    verb.add_argument("--all-users", action="store_true", help="everyone's, as Parquet; then also:")
    for flag, options in flags(BatchSettings):
        verb.add_argument(flag, **options)


def _add_ui(verbs: Any) -> None:
    verb = _verb(verbs, "ui", ui, "MLflow's pages over this workspace")
    verb.add_argument("--host", default="127.0.0.1")
    verb.add_argument("--port", type=int, default=5000)


if __name__ == "__main__":
    sys.exit(main())
