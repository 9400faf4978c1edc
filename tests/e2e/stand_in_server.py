"""A supervisor of stand-in workers, as a program: number of workers, then what they are given."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import structlog

from recsys.schema import InputError
from recsys.serving.supervisor import Facts, Supervisor

WORKER = Path(__file__).with_name("stand_in_worker.py")


def main(workers: int, port: int, given: str) -> int:
    def announce(facts: list[Facts]) -> None:
        said = {"port": listener.getsockname()[1], "workers": facts, "modules": len(sys.modules)}
        print(json.dumps(said), flush=True)

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    supervisor = Supervisor(
        listener, [sys.executable, str(WORKER)], given, workers=workers, stop_seconds=6
    )
    try:
        supervisor.run(announce)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
