"""The pipeline behind as little as there can be, raw ASGI and msgspec: BUNDLE PORT WORKERS.

The event loop reads and writes JSON, two threads do the rest. Of the bare designs that were timed
on two cores this one answered fastest (docs/benchmarks.md). It has no paths, log, limits or checks.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import uvicorn

from bench.plain_pipeline import Pipeline

THREADS = 2


class Ask(msgspec.Struct):
    user_id: str
    k: int = 10


class App:
    def __init__(self) -> None:
        self.pipeline = Pipeline(os.environ["BUNDLE"])
        self.pool = ThreadPoolExecutor(THREADS)
        self.read = msgspec.json.Decoder(Ask).decode
        self.write = msgspec.json.Encoder().encode

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        asked = self.read((await receive())["body"])
        work = self.pipeline.recommend, asked.user_id, asked.k
        answer = await asyncio.get_running_loop().run_in_executor(self.pool, *work)
        body = self.write(answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    bundle, port, _ = sys.argv[1:]
    os.environ["BUNDLE"] = bundle
    uvicorn.run(App(), port=int(port), access_log=False, lifespan="off", interface="asgi3")
