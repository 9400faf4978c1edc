"""The pipeline behind LitServe: BUNDLE PORT WORKERS."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import litserve

from bench.plain_pipeline import Pipeline


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.pipeline = Pipeline(sys.argv[1])

    def decode_request(self, request: dict[str, object]) -> dict[str, object]:
        return request

    def predict(self, asked: dict[str, object]) -> dict[str, object]:
        return self.pipeline.recommend(str(asked["user_id"]), int(str(asked.get("k", 10))))

    def encode_response(self, answer: dict[str, object]) -> dict[str, object]:
        return answer


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/v1/recommend"), accelerator="cpu", workers_per_device=int(sys.argv[3])
    )
    server.run(port=int(sys.argv[2]), num_api_servers=1, generate_client_file=False)
