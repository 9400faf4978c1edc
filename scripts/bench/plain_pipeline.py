"""The same work without recsys' server: a bundle's encoder, index and ranker called in a row.

What a team would write around onnxruntime and faiss on its first day, for FastAPI and LitServe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime

from recsys.history import encode
from recsys.index.bundle import Bundle


class Pipeline:
    """Answers a known user from the bundle's stored history."""

    def __init__(self, path: str) -> None:
        self.bundle = Bundle.open(Path(path), verify=False)
        self.ids = self.bundle.item_ids
        self.users, self.inputs = self.bundle.users, self.bundle.encoder_inputs
        self.encoder = session(self.bundle.encoder_path)
        self.index = faiss.read_index(str(self.bundle.index_paths[0]))
        effort = self.bundle.manifest["index"].get("nprobe")
        self.options = faiss.SearchParametersIVF(nprobe=effort) if effort else None
        entry = self.bundle.manifest.get("ranker")
        self.ranker = session(self.bundle.path / "ranker.onnx") if entry else None
        self.candidates = int(entry["candidates"]) if entry else 0
        faiss.omp_set_num_threads(1)

    def recommend(self, user_id: str, k: int) -> dict[str, Any]:
        row = self.users.get(user_id)
        histories = self.bundle.histories(np.array([-1 if row is None else row]))
        seen = set(histories.items.tolist())
        now = np.array([histories.times[-1] + 1 if len(histories.times) else 0])
        arrays = encode(histories, self.bundle.max_length, now)
        arrays["users"] = np.array([0 if row is None else row + 1])
        feed = {name: arrays[name] for name in self.inputs}
        queries = self.encoder.run(["queries"], feed)[0]
        wanted = (self.candidates or k) + len(seen)
        scores, found = self.index.search(queries[:, 0], wanted, params=self.options)
        keep = [i for i, item in enumerate(found[0] + 1) if item > 0 and item not in seen]
        items, scores = (found[0] + 1)[keep], scores[0][keep]
        if self.ranker is not None:
            items, scores = self.ranked(queries, items[: self.candidates], scores)
        best = np.argsort(-scores)[:k]
        shown = zip(items[best].tolist(), scores[best].tolist(), strict=True)
        return {"items": [{"item_id": str(self.ids[i]), "score": s} for i, s in shown]}

    def ranked(self, queries: Any, items: Any, scores: Any) -> tuple[Any, Any]:
        assert self.ranker is not None
        feed = {
            "queries": queries,
            "candidate_vectors": self.bundle.vectors_ND[items - 1][None],
            "retrieval_scores": scores[None, : len(items)],
        }
        return items, self.ranker.run(["scores"], feed)[0][0]


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
