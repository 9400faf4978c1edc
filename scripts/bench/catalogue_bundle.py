"""Write the bundle of a trained catalogue, its index built and tuned; print what that took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
from protocol import peak_memory_gib

from recsys.data.dataset import Dataset
from recsys.export.bundle import write_bundle


def main() -> None:
    given = json.loads(sys.argv[1])
    out, dataset = Path(given["out"]), Dataset(Path(given["dataset"]))
    facts = json.loads((out / "trained.json").read_text())["facts"]
    started = perf_counter()
    manifest = write_bundle(
        Path(given["bundle"]),
        encoder=out / "encoder.onnx",
        vectors_ND=np.load(out / "vectors.npy", mmap_mode="r"),
        dataset=dataset,
        facts={"name": "catalogue", "model": "trajectory", "run": "bench", **facts},
        index=given["index"],
    )
    figures = {
        "bundle_seconds": round(perf_counter() - started, 1),
        "bundle_peak_gib": round(peak_memory_gib(), 2),
        "index": manifest["index"],
        "vectors_bytes": manifest["files"]["item_vectors.safetensors"]["bytes"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
