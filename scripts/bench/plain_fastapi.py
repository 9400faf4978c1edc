"""The pipeline behind FastAPI and uvicorn: BUNDLE PORT WORKERS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from bench.plain_pipeline import Pipeline


class Ask(BaseModel):
    user_id: str
    k: int = 10


def app() -> FastAPI:
    pipeline, made = Pipeline(os.environ["BUNDLE"]), FastAPI()

    @made.post("/v1/recommend")
    def recommend(ask: Ask) -> dict[str, object]:
        return pipeline.recommend(ask.user_id, ask.k)

    return made


if __name__ == "__main__":
    bundle, port, workers = sys.argv[1:]
    os.environ["BUNDLE"] = bundle
    uvicorn.run(
        "bench.plain_fastapi:app",
        factory=True,
        port=int(port),
        workers=int(workers),
        access_log=False,
        app_dir=str(Path(__file__).parents[1]),
    )
