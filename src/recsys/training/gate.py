"""Holds a continued run against the one before: `python -m recsys.training.gate RUN`.

Ends with 0 where it is good enough, with 3 where it is not, and with 2 where that cannot be told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from recsys.artifacts import Workspace, read_manifest
from recsys.schema import InputError
from recsys.training.runs import BEFORE, OLD, OLD_BEFORE

METRIC = "ndcg@10"
WORSE = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was compared, and return the code to end with."""
    parser = argparse.ArgumentParser(prog="python -m recsys.training.gate", description=__doc__)
    parser.add_argument("run", metavar="RUN")
    about = "share by which it may be worse than the run before on the new test part (0.02)"
    parser.add_argument("--new", type=float, default=0.02, help=about)
    about = "the same on the test part of the run before (0.05)"
    parser.add_argument("--old", type=float, default=0.05, help=about)
    given = parser.parse_args(argv)
    try:
        metrics = read_manifest(Workspace().find("run", given.run), "run")["metrics"]
        found = compared(given.run, metrics, given.new, given.old)
    except InputError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    for line, _ in found:
        print(f"gate: {given.run}: {line}", file=sys.stderr)
    return 0 if all(good for _, good in found) else WORSE


def compared(
    run: str, metrics: Mapping[str, Mapping[str, float]], new: float, old: float
) -> list[tuple[str, bool]]:
    """Return a line on each bound, and whether it is kept.

    >>> metrics = {"test": {METRIC: 0.3}, BEFORE: {METRIC: 0.4}}
    >>> compared("r", metrics | {OLD: {METRIC: 0.3}, OLD_BEFORE: {METRIC: 0.3}}, 0.1, 0.1)[0]
    ('new days: ndcg@10 0.3000, before 0.4000, at least 0.3600 wanted: worse', False)
    """
    if OLD not in metrics:
        raise InputError(
            f"run {run} was not continued from another, so there is nothing to hold it against; "
            "train with resume_from=RUN"
        )
    pairs = {"new days": ("test", BEFORE, new), "old days": (OLD, OLD_BEFORE, old)}
    return [
        _line(where, metrics[ours][METRIC], metrics[theirs][METRIC], bound)
        for where, (ours, theirs, bound) in pairs.items()
    ]


def _line(where: str, ours: float, before: float, bound: float) -> tuple[str, bool]:
    least = before * (1 - bound)
    good = ours >= least
    verdict = "good" if good else "worse"
    line = f"{where}: {METRIC} {ours:.4f}, before {before:.4f}, at least {least:.4f} wanted"
    return f"{line}: {verdict}", good


if __name__ == "__main__":
    sys.exit(main())
