"""The second stage: a bundle's ranker scores what the search found, in the light of the request.

Shapes: B requests (1), H interests, D dim, C candidates, T tasks, L history length, N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recsys.features import Features, ItemTable, gather
from recsys.features.transitions import TYPES, Followed, followed
from recsys.history import Arrays, Histories
from recsys.index.bundle import FEATURES, TABLES, Bundle
from recsys.index.delta import Rows
from recsys.schema import PAD, InputError, suggestion
from recsys.serving.graphs import ENCODED, check_inputs, open_graph
from recsys.serving.paths import Trajectory

if TYPE_CHECKING:
    import onnxruntime

SCORES, PROBABILITIES = "scores", "probabilities"
"""What a ranker answers with: float32 [B, C], or with tasks float32 [B, C, T]."""
CANDIDATES = ("queries", "candidates", "candidate_vectors", "retrieval_scores")
"""What a ranker may read beside an encoder's arrays: float32 [B, H, D], int64 [B, C], float32
[B, C, D] and float32 [B, C]; C is any number."""
OF_FEATURES = (
    *("request_codes", "request_numbers", "path_codes"),
    *("item_codes", "item_numbers", "item_vectors", "cross_numbers"),
    *("item_embeddings", "path_embeddings"),
)
"""What a ranker may read where the bundle holds its features; see `recsys.features`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as a ranker sees it, whatever the candidates; arrays are of one row."""

    arrays: Arrays
    path: Trajectory
    now: int
    weights_T: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a ranker says of some items: scores float64 [C], probabilities [C, T] (T may be 0)."""

    scores_C: NDArray[np.float64]
    probabilities_CT: NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """The columns that a ranker reads, and the bundle's items and users encoded by them."""

    features: Features
    items: ItemTable
    user_codes: NDArray[np.integer]
    user_numbers: NDArray[np.floating]

    @classmethod
    def load(cls, bundle: Bundle, inputs: Sequence[str]) -> Encoded | None:
        """Map the tables that `inputs` are made of; return None where a ranker has no features.

        Raises InputError where they do not fit each other.
        """
        if bundle.ranker_features is None:
            return None
        features = Features.of_json(bundle.ranker_features)
        # Plain arrays over the mapped pages: slicing a numpy.memmap costs five times as much.
        made = ("item_embeddings", "added_embeddings") if "item_embeddings" in inputs else ()
        names = (*TABLES, *made, *({"item_vectors"} & set(inputs)))
        tables = {name: np.asarray(bundle.ranker_table(name)) for name in names}
        _check_tables(bundle, features, tables)
        kept = followed(features.transitions, lambda name: np.asarray(bundle.ranker_table(name)))
        _check_transitions(bundle, kept)
        items = ItemTable(
            tables["item_codes"],
            tables["item_numbers"],
            tables.get("item_vectors", np.zeros((bundle.num_items + 1, 0), np.float32)),
            tables["item_raw"],
            kept,
            *(tables.get(name) for name in made),
        )
        return cls(features, items, tables["user_codes"], tables["user_numbers"])

    def requested(self, user: int, context: Mapping[str, Any], now: int) -> Arrays:
        """Return what is known of a request itself; `user` is a row plus one, 0 unknown.

        Raises InputError for a context that the features do not have.
        """
        codes, numbers = self.user_codes[user : user + 1], self.user_numbers[user : user + 1]
        values = {name: [value] for name, value in context.items()}
        return self.features.requests(codes, numbers, values, np.array([now], np.int64))

    def shown(self, asked: Asked, items_C: NDArray[np.int64], crossed: bool) -> Arrays:
        """Return what is known of the candidates, and of the items of the path."""
        found = gather(self.items, items_C[None], asked.arrays["items"])
        if crossed:
            path, now = Histories.of([asked.path]), np.array([asked.now], np.int64)
            found |= self.features.crossed(path, now, items_C[None], self.items)
        return found


@dataclass(frozen=True)
class Ranker:
    """A ranker's graph, what it reads, and how many candidates it is to choose from.

    tasks: names of the probabilities that it answers with, none where it answers with scores;
    blend_T: their weights in the final score; max_length: the newest events that it reads.
    """

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    candidates: int
    max_length: int
    tasks: tuple[str, ...]
    blend_T: NDArray[np.float64]
    encoded: Encoded | None
    num_items: int

    @classmethod
    def load(cls, bundle: Bundle, threads: int = 1, device: str = "cpu") -> Ranker | None:
        """Open the ranker of a bundle that has one.

        Raises InputError where its manifest's entry, its graph and its tables do not agree with
        each other, or with what a server has.
        """
        if bundle.ranker is None:
            return None
        inputs, candidates, length = _entry(bundle, bundle.ranker)
        tasks, blend_T = _tasks(bundle, bundle.ranker)
        check_inputs(bundle.ranker_path, inputs, (*ENCODED, *CANDIDATES, *OF_FEATURES))
        encoded = Encoded.load(bundle, inputs)
        if encoded is None and (without := [name for name in inputs if name in OF_FEATURES]):
            raise InputError(
                f"{bundle.path}: its ranker reads {', '.join(without)}, which {FEATURES} says how "
                "to make, and that is not there; export the bundle again"
            )
        session = open_graph(bundle.ranker_path, threads, device, sizes={"batch": 1})
        _check_graph(bundle, session, inputs, PROBABILITIES if tasks else SCORES)
        return cls(session, inputs, candidates, length, tasks, blend_T, encoded, bundle.num_items)

    def weights(self, given: Mapping[str, float]) -> NDArray[np.float64]:
        """Return each task's weight [T]: the bundle's own, or the request's in their place.

        Raises InputError for a task that there is not, and where no task has a weight.
        """
        if not given:
            return self.blend_T
        for name in given:
            _check_task(name, self.tasks)
        weights_T = np.array([given.get(name, 0.0) for name in self.tasks])
        if not weights_T.any():
            raise InputError(
                "weights.tasks: 0 for every task leaves no score; give one of "
                f"{', '.join(self.tasks)} a weight, or leave weights.tasks out"
            )
        return weights_T

    def requested(self, user: int, context: Mapping[str, Any], now: int) -> Arrays:
        """Return what is known of the request itself; raise InputError for a wrong context."""
        if self.encoded is None:
            return {}
        return self.encoded.requested(user, context, now)

    def scores(
        self,
        asked: Asked,
        candidates_C: NDArray[np.int64],
        vectors_ND: NDArray[np.float32] | Rows,
        retrieval_C: NDArray[np.floating],
    ) -> Scored:
        """Return what the graph says of one request's candidates; vectors_ND: of all items.

        Of items that were added since, it reads the vector alone, and else what is unknown.
        Raises FloatingPointError where that is not finite, and what the graph itself raises.
        """
        added_C = candidates_C > self.num_items
        known_C = np.where(added_C, PAD, candidates_C)
        found = {
            "candidates": known_C[None],
            "retrieval_scores": retrieval_C[None].astype(np.float32),
        }
        if "candidate_vectors" in self.inputs:
            found["candidate_vectors"] = vectors_ND[candidates_C - 1][None]
        if self.encoded is not None:
            crossed = "cross_numbers" in self.inputs
            found |= self.encoded.shown(asked, known_C, crossed)
            if "item_embeddings" in found and added_C.any():
                vectors_AD = vectors_ND[candidates_C[added_C] - 1]
                found["item_embeddings"][0, added_C] = self.encoded.items.of_added(vectors_AD)
        given = {name: found[name] if name in found else asked.arrays[name] for name in self.inputs}
        output = PROBABILITIES if self.tasks else SCORES
        answered = np.asarray(self.session.run([output], given)[0][0])
        if not np.isfinite(answered).all():
            raise FloatingPointError("the ranker's scores are not finite")
        if not self.tasks:
            return Scored(answered.astype(np.float64), np.zeros((len(candidates_C), 0), np.float32))
        return Scored(answered @ asked.weights_T, answered)


def _check_task(name: str, tasks: tuple[str, ...]) -> None:
    if name not in tasks:
        raise InputError(
            f"weights.tasks: unknown task {name[:60]!r}{suggestion(name[:60], tasks)}; this "
            f"bundle's ranker knows {', '.join(tasks)}"
        )


def _entry(bundle: Bundle, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], int, int]:
    inputs, candidates = entry.get("inputs"), entry.get("candidates")
    length = entry.get("max_length", bundle.max_length)
    if not isinstance(inputs, list) or not isinstance(candidates, int) or candidates < 1:
        raise InputError(
            f"{bundle.path}: the manifest's ranker is {dict(entry)}, expected inputs (a list of "
            "names) and candidates (1 or more); export it again with this version"
        )
    return tuple(map(str, inputs)), candidates, int(length)


def _tasks(bundle: Bundle, entry: Mapping[str, Any]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return a manifest's tasks and their blend: weights of some of them."""
    tasks, blend = tuple(entry.get("tasks", ())), dict(entry.get("blend", {}))
    if tasks and not (blend and set(blend) <= set(tasks)):
        raise InputError(
            f"{bundle.path}: the manifest's ranker has the tasks {', '.join(tasks)} and the blend "
            f"{blend}, expected a weight for one or more of them; export it again"
        )
    return tasks, np.array([float(blend.get(task, 0.0)) for task in tasks])


def _check_tables(bundle: Bundle, features: Features, tables: Mapping[str, NDArray[Any]]) -> None:
    layout = features.layout
    widths = {
        "item_codes": sum(field.width for field in layout.item_codes),
        "item_numbers": len(layout.item_numbers),
        "item_vectors": layout.vector_width,
    }
    for name, table in tables.items():
        rows = {"item": bundle.num_items, "user": bundle.num_users, "added": bundle.dim}
        expected = (1 + rows[name.split("_")[0]], widths.get(name, table.shape[-1]))
        if table.shape != expected:
            raise InputError(
                f"{bundle.path / 'ranker' / name}.npy: {table.shape}, expected {expected}; export "
                "the bundle again"
            )


def _check_transitions(bundle: Bundle, kept: Sequence[Followed]) -> None:
    """Raise InputError where transitions are not of this bundle's items."""
    for one in kept:
        rows = {len(one.shares) - 1, len(one.firsts) - 1, (len(one.starts) - 1) // TYPES - 1}
        if rows != {bundle.num_items}:
            raise InputError(
                f"{bundle.path / 'ranker'}: transitions of {' and '.join(map(str, sorted(rows)))} "
                f"items, expected {bundle.num_items}; export the bundle again"
            )


def _check_graph(
    bundle: Bundle, session: onnxruntime.InferenceSession, inputs: tuple[str, ...], output: str
) -> None:
    read = [value.name for value in session.get_inputs()]
    if sorted(read) != sorted(inputs):
        raise InputError(
            f"{bundle.ranker_path}: the graph reads {', '.join(read)}, its manifest says "
            f"{', '.join(inputs)}; export the bundle again"
        )
    answers = [value.name for value in session.get_outputs()]
    if output not in answers:
        raise InputError(
            f"{bundle.ranker_path}: the graph answers with {', '.join(answers)}, expected "
            f"{output}; export the bundle again"
        )
