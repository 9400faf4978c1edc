"""`python -m recsys.serving`: serve a bundle where only the serving extra is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from recsys.artifacts import Workspace
from recsys.schema import InputError
from recsys.serving.http import serve
from recsys.serving.settings import ServeSettings, flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the exit code, 2 where something given is wrong."""
    parser = argparse.ArgumentParser(prog="python -m recsys.serving", description=__doc__)
    parser.add_argument("--workspace", help="where named bundles live (RECSYS_HOME, ./workspace)")
    for flag, options in flags():
        parser.add_argument(flag, **options)
    given = vars(parser.parse_args(arguments))
    workspace = Workspace(given.pop("workspace"))
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        serve(ServeSettings(**chosen), workspace)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
