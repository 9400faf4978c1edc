"""Weights for a grown dataset: who was there keeps the row, who is new starts near what is alike.

Shapes: N items of the new dataset, K known of them, M new, D dim, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from recsys.data.catalogue import encode_column, values_of
from recsys.data.dataset import Dataset
from recsys.schema import InputError
from recsys.training.runs import LoadedRun
from recsys.training.start import neighbourhood

Rows = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows of a new table, and the rows of the old one that they are."""


@torch.no_grad()
def grow_weights(model: nn.Module, before: LoadedRun, dataset: Dataset) -> None:
    """Fill `model`, made for `dataset`, from a run on a dataset that it has grown from.

    New items start at the mean of the known ones near them in training, or else of those with the
    same categorical features, or else where `model` has them; new users and features stay there.
    Raises InputError naming what does not fit.
    """
    old, new = before.model.state_dict(), model.state_dict()
    tables = dict(_tables(before.dataset, dataset))
    _check_inputs(before.model, model)
    _check_fit(old, new, tables)
    for name, weight in new.items():
        if name in tables:
            rows, source = tables[name]
            weight[rows] = old[name][source]
        else:
            weight.copy_(old[name])
    known = before.dataset.num_items
    if dataset.num_items > known and "items.weight" in new:  # rows that ids share are there
        _start_new(new["items.weight"], known, dataset)


def _tables(before: Dataset, now: Dataset) -> Iterator[tuple[str, Rows]]:
    """Yield the name of each table that grows with a dataset, and which rows stay."""
    for name, count in (("items", before.num_items), ("users", before.num_users)):
        yield f"{name}.weight", (np.arange(count + 1), np.arange(count + 1))
        for column, kind in before.manifest[f"{name[:-1]}_features"].items():
            if kind == "categorical":
                pair = (values_of(getattr(one, name)[column]) for one in (before, now))
                yield f"{name[:-1]}_features.tables.{column}.weight", _same_values(*pair)


def _same_values(before: pa.Array, now: pa.Array) -> Rows:
    """Return where the old values stand among the new, both counted from 1; 0 stays unknown.

    >>> _same_values(pa.array(["a", "c"]), pa.array(["b", "c"]))
    (array([0, 2]), array([0, 2]))
    """
    place = pc.fill_null(pc.index_in(before, now), -1).to_numpy(zero_copy_only=False)
    there = np.flatnonzero(place >= 0)
    return np.append(0, place[there] + 1), np.append(0, there + 1)


def _check_inputs(before: nn.Module, model: nn.Module) -> None:
    old, new = (cast("tuple[str, ...]", one.inputs) for one in (before, model))
    if old != new:
        raise InputError(
            f"resume_from: the run reads {', '.join(old)}, on the grown dataset the model would "
            f"read {', '.join(new)}: the new days brought what the old had not (event types, for "
            "one). Train anew without resume_from"
        )


def _check_fit(old: dict[str, Tensor], new: dict[str, Tensor], tables: dict[str, Rows]) -> None:
    for name in sorted({*old, *new}):
        shapes = [tuple(one[name].shape) if name in one else None for one in (old, new)]
        compared = [s and s[1:] if name in tables else s for s in shapes]
        if compared[0] != compared[1]:
            raise InputError(
                f"resume_from: {name} is {shapes[0] or 'missing'} in the run, here it is "
                f"{shapes[1] or 'missing'}; continue with the same model, or train anew without "
                "resume_from"
            )


def _start_new(weight_ND: Tensor, known: int, dataset: Dataset) -> None:
    """Put the rows after `known` at the weighted mean of known rows that are alike."""
    new = slice(known, dataset.num_items)
    alike_MK = neighbourhood(dataset)[new, :known]
    by_feature_MK = _shared(dataset, known)
    lonely_M1 = np.asarray(alike_MK.sum(axis=1))[:, None] == 0
    alike_MK = alike_MK + by_feature_MK.multiply(lonely_M1)
    total_M = np.asarray(alike_MK.sum(axis=1))
    some = np.flatnonzero(total_M)
    mean = alike_MK.tocsr()[some] @ weight_ND[1 : known + 1].numpy() / total_M[some, None]
    weight_ND[torch.from_numpy(known + 1 + some)] = torch.from_numpy(mean).to(weight_ND.dtype)


def _shared(dataset: Dataset, known: int) -> sparse.csr_array:
    """Return how many categorical features each new item shares with each known one: [M, K]."""
    shared = sparse.csr_array((dataset.num_items - known, known))
    for column, kind in dataset.manifest["item_features"].items():
        if kind == "categorical":
            codes = encode_column(dataset.items[column]).codes[1:]
            has = sparse.csr_array(
                ((codes > 0).astype(float), (np.arange(len(codes)), codes)),
                shape=(len(codes), int(codes.max(initial=0)) + 1),
            )
            shared = shared + has[known:] @ has[:known].T
    return shared.tocsr()
