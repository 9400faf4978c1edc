"""The second stage: a bundle's ranker scores what the search found, in the light of the request.

Shapes: B requests (1), H interests, D dim, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.history import Arrays
from recsys.index.bundle import Bundle
from recsys.schema import InputError
from recsys.serving.graphs import ENCODED, check_inputs, open_graph

if TYPE_CHECKING:
    import onnxruntime

OUTPUT = "scores"
CANDIDATES = ("queries", "candidates", "candidate_vectors", "retrieval_scores")
"""What a ranker may read beside an encoder's arrays: float32 [B, H, D], int64 [B, C], float32
[B, C, D] and float32 [B, C]; C is any number."""


@dataclass(frozen=True)
class Ranker:
    """A ranker's graph, what it reads, and how many candidates it is to choose from."""

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    candidates: int

    @classmethod
    def load(cls, bundle: Bundle, threads: int = 1) -> Ranker | None:
        """Open the ranker of a bundle that has one.

        Raises InputError where its manifest's entry and its graph do not agree with each other, or
        with what a server has.
        """
        if bundle.ranker is None:
            return None
        inputs, candidates = _entry(bundle, bundle.ranker)
        check_inputs(bundle.ranker_path, inputs, (*ENCODED, *CANDIDATES))
        session = open_graph(bundle.ranker_path, threads)
        _check_graph(bundle, session, inputs)
        return cls(session, inputs, candidates)

    def scores(
        self,
        arrays: Arrays,
        queries_HD: NDArray[np.float32],
        candidates_C: NDArray[np.int64],
        vectors_CD: NDArray[np.float32],
        retrieval_C: NDArray[np.floating],
    ) -> NDArray[np.float64]:
        """Return one request's scores [C]; `arrays` are its encoded history, of one row."""
        found = {
            "queries": queries_HD[None],
            "candidates": candidates_C[None],
            "candidate_vectors": vectors_CD[None],
            "retrieval_scores": retrieval_C[None].astype(np.float32),
        }
        given = {name: found[name] if name in found else arrays[name] for name in self.inputs}
        scores_C = np.asarray(self.session.run([OUTPUT], given)[0][0], np.float64)
        if not np.isfinite(scores_C).all():
            raise FloatingPointError("the ranker's scores are not finite")
        return scores_C


def _entry(bundle: Bundle, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    inputs, candidates = entry.get("inputs"), entry.get("candidates")
    if not isinstance(inputs, list) or not isinstance(candidates, int) or candidates < 1:
        raise InputError(
            f"{bundle.path}: the manifest's ranker is {dict(entry)}, expected inputs (a list of "
            "names) and candidates (1 or more); export it again with this version"
        )
    return tuple(map(str, inputs)), candidates


def _check_graph(
    bundle: Bundle, session: onnxruntime.InferenceSession, inputs: tuple[str, ...]
) -> None:
    read = [value.name for value in session.get_inputs()]
    if sorted(read) != sorted(inputs):
        raise InputError(
            f"{bundle.ranker_path}: the graph reads {', '.join(read)}, its manifest says "
            f"{', '.join(inputs)}; export the bundle again"
        )
    answers = [value.name for value in session.get_outputs()]
    if OUTPUT not in answers:
        raise InputError(
            f"{bundle.ranker_path}: the graph answers with {', '.join(answers)}, expected "
            f"{OUTPUT}; export the bundle again"
        )
