"""A worker without a model, for the supervisor's tests: `/pid`, `/slow`, `/readyz`, `/seat`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from typing import Any

import uvicorn

from recsys.schema import InputError
from recsys.serving.accepting import Acceptor
from recsys.serving.protocol import Patience, Receive, Scope, Send, patient
from recsys.serving.supervisor import Seat, work


class Server(uvicorn.Server):
    """uvicorn that reports when it is ready, and goes on for a while when told to stop."""

    def __init__(self, seat: Seat, given: dict[str, Any]) -> None:
        self.seat, self.given, self.patience = seat, given, Patience()
        super().__init__(
            uvicorn.Config(
                self.app,
                http=patient(self.patience),  # type: ignore[arg-type]
                interface="asgi3",
                lifespan="off",
                ws="none",
                log_config=None,
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets
        await super().startup([])
        self.acceptor = Acceptor(self, sockets[0], self.seat.held())
        self.patience.ended = self.acceptor.publish
        self.acceptor.start()
        self.seat.ready({"pid": os.getpid(), "number": self.seat.number})
        if self.given.get("dies_when_ready"):
            os._exit(7)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.patience.draining = True
        self.acceptor.leave()
        await asyncio.sleep(self.given.get("grace_seconds", 0.0))
        self.acceptor.stop()
        await super().shutdown(sockets)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 200
        if scope["path"] == "/slow":
            await asyncio.sleep(self.given.get("slow_seconds", 1.0))
        elif scope["path"] == "/readyz" and self.patience.draining:
            status = 503
        body = json.dumps(
            {"pid": os.getpid(), "number": self.seat.number, "folder": self.seat.folder}
        ).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def serve(seat: Seat) -> None:
    given = json.loads(seat.given)
    if given.get("fails") == seat.number:
        raise InputError("no bundle here; next: recsys export")
    if given.get("crashes") == seat.number:
        raise RuntimeError("ours")
    listener = socket.socket(fileno=seat.listener)
    listener.listen(2048)
    Server(seat, given).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(work(serve))
