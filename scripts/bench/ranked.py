"""A copy of a bundle with a stand-in ranker: a small network over 200 candidates, random weights.

It costs what a small real one costs; what it answers means nothing.
Shapes: B requests, C candidates, D dim, W width.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from recsys.artifacts import MANIFEST, read_manifest, write_manifest

CANDIDATES = 200
WIDTHS = (64, 32)
INPUTS = ("queries", "candidate_vectors", "retrieval_scores")


def ranked(bundle: Path, copy: Path) -> Path:
    """Make `copy` of a bundle, with a ranker; files that stay the same are linked."""
    copy.mkdir(parents=True)
    for file in bundle.rglob("*"):
        target = copy / file.relative_to(bundle)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        elif file.name != MANIFEST:
            os.link(file, target)
    facts = read_manifest(bundle, "bundle")
    onnx.save(graph(int(facts["dim"])), copy / "ranker.onnx")
    made = ("kind", "schema_version", "recsys_version", "created", "files", "fingerprint")
    kept = {name: value for name, value in facts.items() if name not in made}
    kept |= {"version": copy.name, "self_test": []}
    entry = {"inputs": list(INPUTS), "candidates": CANDIDATES}
    write_manifest(copy, "bundle", **kept, ranker=entry)
    return copy


def graph(dim: int, seed: int = 0) -> onnx.ModelProto:
    """Return a network on each candidate's vector, the query, their product and score.

    What depends on the query alone is computed once: its own part of the first layer, and the
    product's weights times the query, which a candidate's vector then meets in one product.
    """
    rng = np.random.default_rng(seed)
    wide, narrow = WIDTHS
    weights = {
        name: rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        for name, rows, columns in (
            ("w_candidate", dim, wide),
            ("w_product", dim, wide),
            ("w_query", dim, wide),
            ("w_found", 1, wide),
            ("w_hidden", wide, narrow),
            ("w_out", narrow, 1),
        )
    }
    floats = {
        "queries": ["batch", "interests", dim],
        "candidate_vectors": ["batch", "candidates", dim],
        "retrieval_scores": ["batch", "candidates"],
    }
    steps = (
        ("Slice", ["queries", "zero", "one", "axis"], "query"),
        ("Transpose", ["query"], "query_BD1"),
        ("Mul", ["query_BD1", "w_product"], "of_product"),
        ("Add", ["of_product", "w_candidate"], "of_candidate"),
        ("MatMul", ["candidate_vectors", "of_candidate"], "a"),
        ("MatMul", ["query", "w_query"], "b"),
        ("Unsqueeze", ["retrieval_scores", "last"], "found"),
        ("Mul", ["found", "w_found"], "c"),
        ("Sum", ["a", "b", "c"], "d"),
        ("Relu", ["d"], "e"),
        ("MatMul", ["e", "w_hidden"], "f"),
        ("Relu", ["f"], "g"),
        ("MatMul", ["g", "w_out"], "h"),
        ("Squeeze", ["h", "last"], "scores"),
    )
    nodes = [helper.make_node(kind, given, [out]) for kind, given, out in steps]
    nodes[1].attribute.append(helper.make_attribute("perm", [0, 2, 1]))
    constants = {"zero": [0], "one": [1], "axis": [1], "last": [2], **weights}
    initial = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in floats.items()]
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "candidates"])
    made = helper.make_graph(nodes, "stand_in", inputs, [output], initial)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
