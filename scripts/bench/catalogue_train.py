"""Train the shipped model for some steps on a prepared catalogue; leave its graph and vectors.

Item vectors start by aisle (`aisles.vectors`): so few steps would leave most of them random.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from aisles import vectors
from hydra.utils import instantiate
from protocol import peak_memory_gib

from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.export.bundle import item_vectors
from recsys.export.onnx import export_encoder
from recsys.launch import configure
from recsys.losses import ItemSide
from recsys.training.memory import keep_large_buffers


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    keep_large_buffers()
    out, dataset = Path(given["out"]), Dataset(Path(given["dataset"]))
    sizes = [f"model.dim={given['dim']}", f"model.max_length={given['length']}"]
    config = configure(["loss=sampled_softmax", "loss.negatives=1024", *sizes])
    catalogue = Catalogue.of(dataset)
    model = instantiate(config.model, catalogue=catalogue)
    numbers_N = dataset.items["item_id"].to_numpy().astype(np.int64)
    with torch.no_grad():
        model.items.weight[1:] = torch.from_numpy(vectors(numbers_N, given["dim"]))
    counts = torch.from_numpy(catalogue.train_count).float()
    side = ItemSide(model.item_vectors, model.vectors_of, counts / counts.sum())
    loss_of, optimizer = instantiate(config.loss), instantiate(config.optimizer)(model.parameters())
    batches = instantiate(config.batches, dataset=dataset, seed=1, length=given["length"])
    losses, started = [], perf_counter()
    for step in range(given["steps"]):
        loss = loss_of(*model.training_pairs(batches[(0, step)]), side)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (perf_counter() - started) / given["steps"]
    trained_gib = peak_memory_gib()
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    started = perf_counter()
    model.eval()
    export_encoder(model, out / "encoder.onnx")
    np.save(out / "vectors.npy", item_vectors(model))
    facts = {"encoder_inputs": list(model.inputs), "max_length": model.max_length}
    figures = {
        "seconds_a_step": round(seconds, 3),
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
        "train_peak_gib": round(trained_gib, 2),
        "export_seconds": round(perf_counter() - started, 1),
        "export_peak_gib": round(peak_memory_gib(), 2),
    }
    (out / "trained.json").write_text(json.dumps({"facts": facts, "figures": figures}))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
