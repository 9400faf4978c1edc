"""Where item vectors start: at random, or from which items follow each other in training.

Shapes: E training events, N items, D dim.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import nn

from recsys.data.dataset import Dataset
from recsys.evaluation.baselines import training_events
from recsys.schema import InputError

Start = Literal["random", "cooccurrence"]
WINDOW = 3
"""Events apart at which two items still count as neighbours, a third as much at the last."""
SMOOTHING = 0.75
"""Power of an item's count as a neighbour: rare ones would else look too related."""
SPREAD = 0.02
"""Standard deviation of the vectors, as at random."""


def check_start(start: Start) -> None:
    """Raise InputError for an unknown word."""
    if start not in get_args(Start):
        raise InputError(f"item_start={start}: expected {' or '.join(get_args(Start))}")


def start_items(model: nn.Module, dataset: Dataset, start: Start) -> None:
    """Put `model.items` where `start` says."""
    check_start(start)
    if start == "cooccurrence":
        if not isinstance(model.items, nn.Embedding):
            raise InputError(
                "item_start=cooccurrence gives each item a row of its own; use embedding=dense, or "
                "item_start=random"
            )
        vectors_ND = cooccurrence_vectors(dataset, model.items.embedding_dim)
        with torch.no_grad():
            model.items.weight[1:] = torch.from_numpy(vectors_ND)


def cooccurrence_vectors(dataset: Dataset, dim: int) -> NDArray[np.float32]:
    """Return vectors whose products tell how much more often two items meet than by chance.

    float32 [N, D]: a singular value decomposition of the positive pointwise mutual information of
    items within `WINDOW` training events of each other. Source: Levy and Goldberg
    2014, section 4.2.
    """
    surprise_NN = positive_information(neighbourhood(dataset))
    rank = min(dim, dataset.num_items - 1)
    vectors_ND = np.zeros((dataset.num_items, dim), np.float32)
    if surprise_NN.nnz and rank > 0:
        first = np.random.default_rng(0).normal(size=dataset.num_items)
        left_NR, strength_R, _ = svds(surprise_NN, k=rank, v0=first)
        vectors_ND[:, :rank] = left_NR * np.sqrt(strength_R)
    return SPREAD * vectors_ND / max(1e-12, float(vectors_ND.std()))


def neighbourhood(dataset: Dataset) -> sparse.csr_array:
    """Return how often two items are near in training, nearer counting more: [N, N], symmetric."""
    events = training_events(dataset)
    items_E = events.items - 1
    size = (dataset.num_items, dataset.num_items)
    near_NN = sparse.csr_array(size, dtype=np.float64)
    for apart in range(1, WINDOW + 1):
        pairs = np.flatnonzero(events.users[apart:] == events.users[:-apart])
        weight = np.full(len(pairs), 1 / apart)
        near_NN += sparse.csr_array((weight, (items_E[pairs], items_E[pairs + apart])), shape=size)
    return (near_NN + near_NN.T).tocsr()


def positive_information(near_NN: sparse.csr_array) -> sparse.csr_array:
    """Return log of how much likelier two items meet than by chance, where it is above 0.

    >>> near = sparse.csr_array(np.array([[0.0, 2, 0], [2, 0, 1], [0, 1, 0]]))
    >>> positive_information(near).toarray().round(2).tolist()
    [[0.0, 0.78, 0.0], [0.68, 0.0, 0.5], [0.0, 0.78, 0.0]]
    """
    pairs = near_NN.tocoo()
    rows, columns = pairs.coords
    total_N = near_NN.sum(axis=1)
    smoothed_N = total_N**SMOOTHING
    chance = total_N[rows] * smoothed_N[columns] / smoothed_N.sum()
    information = np.log(pairs.data / chance)
    kept = information > 0
    values = information[kept], (rows[kept], columns[kept])
    return sparse.csr_array(values, shape=near_NN.shape)
