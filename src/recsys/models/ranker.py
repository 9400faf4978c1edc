"""The ranker: scores candidates of a request on features of both, task by task.

Shapes: B requests, C candidates, L path length, T tasks, W codes, F fields, G numbers, D dim,
R width of a request's features, K of a candidate's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.features import Field, Layout
from recsys.models.calibration import Calibration
from recsys.models.chances import RetrievalChances, kinds
from recsys.models.crossing import Dcnv2
from recsys.models.heads import Mmoe
from recsys.models.lookups import Embedding, Run
from recsys.models.target import PathItems, TargetAttention
from recsys.schema import InputError

MakePart = Callable[..., Any]
OF_REQUESTS = {"request_codes", "request_numbers", "queries"}
"""Inputs that say something of a request."""


class Ranker(nn.Module):
    """Answers one logit a task for every candidate of a request (`dwell`: log1p of seconds).

    `crossing`, `path` and `heads` make its parts (see `recsys.models.crossing`, `target` and
    `heads`); `path` null reads no history. `retriever`, the width of a retriever's vectors,
    adds how probable it thinks the item and others of its kind, and what its query and item vectors
    say; `event_types`, `gaps` and `values` are what else is read of the path. `inputs` are the
    arrays that `layout` has, and those of the path and the retriever.
    """

    layout = "shown"

    def __init__(
        self,
        layout: Layout,
        tasks: Sequence[str],
        max_length: int = 50,
        retriever: int = 0,
        dim: int = 16,
        numbers: int = 64,
        dropout: float = 0.1,
        crossing: MakePart = Dcnv2,
        path: MakePart | None = TargetAttention,
        heads: MakePart = Mmoe,
        event_types: bool = True,
        gaps: bool = True,
        values: bool = False,
    ) -> None:
        super().__init__()
        self.tasks, self.max_length = _checked(tasks), max_length
        wanted = {"types": event_types, "gaps": gaps, "values": values}
        reads = tuple(name for name, read in wanted.items() if read)
        self.inputs = _inputs(layout, retriever, path is not None, reads)
        self.codes = Codes(layout.request_codes, layout.item_codes, dim)
        self.numbers = nn.ModuleDict(
            {name: Numbers(count, numbers) for name, count in _counts(layout, retriever).items()}
        )
        self.vectors = nn.Linear(layout.vector_width, dim) if layout.vector_width else None
        self.retriever = retriever
        self.query = _read_by(retriever, dim) if retriever else None
        self.found = nn.Linear(retriever, dim) if retriever else None
        self.chances = RetrievalChances(retriever, layout) if retriever else None
        self.anyone = nn.Parameter(torch.zeros(1, dim))
        fields = len(layout.item_codes)
        self.path = path and path(fields, dim, max_length, dropout, reads)
        self.crossing = crossing(*self._widths(layout, dim), dropout)
        self.heads = heads(self.crossing.width, self.tasks, dropout)
        # Gradients of what is never read would be waited for where several processes train.
        self.anyone.requires_grad_(not (set(self.inputs) & OF_REQUESTS))
        self.calibration = Calibration(self.tasks)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return logit_BCT; `arrays` in the order of `inputs`."""
        return self.answer(dict(zip(self.inputs, arrays, strict=True)))

    def answer(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logit_BCT; of items it takes what `item_embeddings` returned, where that is given.

        `path_codes` are [B, L, W], or with `path_places` int64 [B, L] those of distinct items.
        """
        request_BR, candidate_BCK = self._request(batch), self._candidates(batch)
        logit_NT = self.heads(self.crossing(request_BR, candidate_BCK))
        return cast(Tensor, logit_NT.unflatten(0, candidate_BCK.shape[:2]))

    def item_embeddings(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return all that is made of items alone, whoever asks: [B, C, E], E `embedding_width`."""
        return torch.cat(list(self._of_items(batch).values()), dim=-1)

    @property
    def embedding_width(self) -> int:
        """Width of `item_embeddings`."""
        return sum(self._item_widths.values())

    @cached_property
    def _item_widths(self) -> dict[str, int]:
        """The parts of `item_embeddings`, in their order; of the path's items the first is read."""
        dim = self.codes.table.embedding_dim
        widths = {
            "codes": len(self.codes.fields["item_codes"]) * dim,
            "asks": 0 if self.path is None else self.path.asks_width,
            "vectors": dim * ((self.vectors is not None) + (self.found is not None)),
        }
        return {name: width for name, width in widths.items() if width}

    def _of_items(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "item_embeddings" in batch:
            parts = batch["item_embeddings"].split(list(self._item_widths.values()), dim=-1)
            return dict(zip(self._item_widths, parts, strict=True))
        found = {}
        if "codes" in self._item_widths:
            found["codes"] = self.codes("item_codes", batch["item_codes"])
        if self.path is not None:
            found["asks"] = self.path.asks(found["codes"])
        vectors = []
        if self.vectors is not None:
            vectors.append(self.vectors(batch["item_vectors"]))
        if self.chances is not None and self.found is not None:
            met_BC1 = self.chances.has_met(batch)[..., None]
            vectors.append(self.found(batch["candidate_vectors"]) * met_BC1)
        if vectors:
            found["vectors"] = torch.cat(vectors, dim=-1)
        return found

    def _request(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return request_BR; where nothing is known of requests, one learned vector for all."""
        parts = []
        if "request_codes" in batch:
            parts.append(self.codes("request_codes", batch["request_codes"]))
        if "request_numbers" in batch:
            parts.append(self.numbers["request_numbers"](batch["request_numbers"]))
        if self.query is not None:
            parts.append(self.query(batch["queries"].mean(1)))
        if not parts:
            parts.append(self.anyone.expand(next(iter(batch.values())).shape[0], -1))
        return torch.cat(parts, dim=-1)

    def _candidates(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return candidate_BCK: the item, its numbers beside the path's, and what the path says."""
        of = self._of_items(batch)
        parts = [of["codes"]] if "codes" in of else []
        if self.path is not None:
            parts.append(self.path(of["codes"], of["asks"], self._items_of_path(batch), batch))
        if "candidate_numbers" in self.numbers:
            parts.append(self.numbers["candidate_numbers"](self._candidate_numbers(batch)))
        if "vectors" in of:
            parts.append(of["vectors"])
        return torch.cat(parts, dim=-1)

    def _candidate_numbers(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of candidates side by side, the retriever's last: [B, C, G]."""
        numbers = [batch[name] for name in ("item_numbers", "cross_numbers") if name in batch]
        if self.chances is not None:
            numbers.append(self.chances(batch))
        return torch.cat(numbers, dim=-1)

    def standardise(self, batch: Mapping[str, Tensor]) -> None:
        """Take the scale of every number from some training requests."""
        if "request_numbers" in self.numbers:
            cast(Numbers, self.numbers["request_numbers"]).fit(batch["request_numbers"])
        if "candidate_numbers" in self.numbers:
            real_BC = ~batch["labels"].isnan().all(-1)
            number_BCG = self._candidate_numbers(batch)
            cast(Numbers, self.numbers["candidate_numbers"]).fit(number_BCG[real_BC])

    def _items_of_path(self, batch: Mapping[str, Tensor]) -> PathItems:
        if "path_embeddings" in batch:
            return PathItems(batch["path_embeddings"][..., : self._item_widths["codes"]])
        return PathItems(self.codes("item_codes", batch["path_codes"]), batch.get("path_places"))

    def _widths(self, layout: Layout, dim: int) -> tuple[int, int]:
        """Return the widths of request_BR and of candidate_BCK."""
        numbers = {name: cast(Numbers, part).width for name, part in self.numbers.items()}
        read_by = self.query is not None
        request = (len(layout.request_codes) + read_by) * dim + numbers.get("request_numbers", 0)
        codes = (len(layout.item_codes) + (self.vectors is not None) + read_by) * dim
        read = 0 if self.path is None else self.path.width
        return request or dim, codes + numbers.get("candidate_numbers", 0) + read


class Codes(nn.Module):
    """One table for the vectors of all categorical fields: a lookup for each array of codes.

    A field of one place has a learned vector for code 0, missing; of several places, the mean of
    those that are not 0.
    """

    def __init__(self, request: Sequence[Field], item: Sequence[Field], dim: int) -> None:
        super().__init__()
        self.fields = {"request_codes": tuple(request), "item_codes": tuple(item)}
        self.runs = {}
        row = 1
        for name, fields in self.fields.items():
            first_F = row + torch.tensor([0, *(f.size for f in fields)]).cumsum(0)
            self.runs[name] = _runs(fields, row)
            widths_F = torch.tensor([f.width for f in fields], dtype=torch.long)
            first_W = first_F[:-1].repeat_interleave(widths_F)
            self.register_buffer(f"{name}_first", first_W, persistent=False)
            single_W = (widths_F == 1).repeat_interleave(widths_F)
            self.register_buffer(f"{name}_single", single_W, persistent=False)
            member_WF = torch.eye(len(fields)).repeat_interleave(widths_F, dim=0)
            self.register_buffer(f"{name}_member", member_WF, persistent=False)
            row = int(first_F[-1])
        self.table = Embedding(row, dim, padding_idx=0)
        nn.init.normal_(self.table.weight[1:].detach(), std=0.05)

    def forward(self, name: str, codes: Tensor) -> Tensor:
        """Return the fields' vectors side by side, [..., F * D], of codes [..., W]."""
        rows, runs = codes + self.get_buffer(f"{name}_first"), self.runs[name]
        if not any(run.sums for run in runs):
            return cast(Tensor, self.table(rows).flatten(-2))
        rows = torch.where((codes > 0) | self.get_buffer(f"{name}_single"), rows, 0)
        summed = self.table.summed(rows, runs).unflatten(-1, (len(self.fields[name]), -1))
        there = (rows > 0).to(summed.dtype)
        count_F = (there @ self.get_buffer(f"{name}_member")).clamp(min=1.0)
        return (summed / count_F[..., None]).flatten(-2)


def _runs(fields: Sequence[Field], row: int) -> list[Run]:
    """Return the places of each field of several, and of neighbours of one place together.

    row: where the fields' rows begin.

    >>> _runs([Field("a", 2), Field("b", 2), Field("c", 2, 5)], 1)
    [Run(width=2, sums=False, values=range(1, 5)), Run(width=5, sums=True, values=range(5, 7))]
    """
    runs = []
    for several, found in groupby(fields, lambda field: field.width > 1):
        run = list(found)
        for some in [[field] for field in run] if several else [run]:
            end = row + sum(field.size for field in some)
            runs.append(Run(sum(field.width for field in some), several, range(row, end)))
            row = end
    return runs


class Numbers(nn.Module):
    """Numbers side by side, missing ones 0 and marked, with hidden units that read them together.

    >>> Numbers(2, 4)(torch.tensor([[0.5, float("nan")]])).shape
    torch.Size([1, 8])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, count: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.hidden = nn.Linear(2 * count, hidden)
        self.width = 2 * count + hidden

    def fit(self, number_RG: Tensor) -> None:
        """Standardise each number from now on as in some rows, where it is known and varies."""
        for place, number_R in enumerate(number_RG.unbind(-1)):
            known_R = number_R[~number_R.isnan()].double()
            if len(known_R) and known_R.std(correction=0) > 0:
                self.mean[place], self.scale[place] = known_R.mean(), known_R.std(correction=0)

    def forward(self, number_G: Tensor) -> Tensor:
        """Return [..., 2 * G + hidden] of numbers [..., G], NaN where missing."""
        missing_G = number_G.isnan()
        known_G = torch.where(missing_G, 0.0, (number_G - self.mean) / self.scale)
        both = torch.cat([known_G, missing_G.to(known_G.dtype)], dim=-1)
        return torch.cat([both, F.relu(self.hidden(both))], dim=-1)


class Calibrated(nn.Module):
    """A ranker that answers with calibrated probabilities (`dwell`: seconds).

    `embedded` reads items' embeddings, which a bundle has made beforehand.
    """

    def __init__(self, ranker: Ranker, embedded: bool = False) -> None:
        super().__init__()
        self.ranker = ranker
        self.inputs, self.tasks, self.max_length = ranker.inputs, ranker.tasks, ranker.max_length
        if embedded:
            self.inputs = _embedded(ranker)
        self.retriever = ranker.retriever
        # Looked at here: a graph has no branches, and most calibrations no lines.
        self.lines = ranker.calibration.has_lines

    def forward(self, *arrays: Tensor) -> Tensor:
        """Return probability_BCT; `arrays` in the order of `inputs`."""
        logit_BCT = self.ranker.answer(dict(zip(self.inputs, arrays, strict=True)))
        return cast(Tensor, self.ranker.calibration(logit_BCT, self.lines))

    def item_embeddings(
        self,
        codes_NW: NDArray[np.integer],
        vectors_NV: NDArray[np.float32],
        found_ND: NDArray[np.float32],
        rows: int = 1 << 16,
    ) -> NDArray[np.float32]:
        """Return what to give for items of these codes and vectors: float32 [N, E].

        vectors: their own, of the declared columns; found: their retriever's.
        """
        given = {"item_codes": codes_NW, "item_vectors": vectors_NV, "candidate_vectors": found_ND}
        parts = []
        for at in range(0, len(codes_NW), rows):
            some = {name: torch.from_numpy(array[at : at + rows]) for name, array in given.items()}
            some["item_codes"] = some["item_codes"].long()
            with torch.no_grad():
                parts.append(self.ranker.item_embeddings(some))
        return torch.cat(parts).numpy()


MADE = ("item_codes", "item_vectors", "candidate_vectors", "path_codes")
"""Inputs that embeddings of items stand for."""


def _embedded(ranker: Ranker) -> tuple[str, ...]:
    """Return a ranker's inputs with embeddings of items; chances read a candidate's codes too."""
    read = set(ranker.inputs) & set(MADE)
    put = {
        "item_codes": "item_codes" in read and ranker.chances is not None,
        "item_embeddings": bool(read),
        "path_embeddings": "path_codes" in read,
    }
    left = [name for name in ranker.inputs if name not in MADE]
    return (*left, *(name for name, wanted in put.items() if wanted))


def _counts(layout: Layout, retriever: int) -> dict[str, int]:
    """Return how many numbers each side has, where it has some."""
    candidate = len(layout.item_numbers) + len(layout.cross_numbers)
    candidate += 1 + len(kinds(layout.item_codes)) if retriever else 0
    counts = {"request_numbers": len(layout.request_numbers), "candidate_numbers": candidate}
    return {name: count for name, count in counts.items() if count}


def _inputs(layout: Layout, retriever: int, path: bool, reads: Sequence[str]) -> tuple[str, ...]:
    if path and not layout.item_codes:
        raise InputError(
            "model.path reads categorical item columns, and features declare none; add one, as in "
            "category: {of: item, kind: categorical}, or use model/path=none"
        )
    there = {
        "request_codes": bool(layout.request_codes),
        "request_numbers": bool(layout.request_numbers),
        "item_codes": bool(layout.item_codes),
        "item_numbers": bool(layout.item_numbers),
        "item_vectors": layout.vector_width > 0,
        "cross_numbers": bool(layout.cross_numbers),
        **dict.fromkeys(("retrieval_scores", "queries", "candidate_vectors"), retriever > 0),
        **dict.fromkeys(("path_codes", *reads, "lengths"), path),
    }
    inputs = tuple(name for name, wanted in there.items() if wanted)
    if not set(inputs) - {"request_codes", "request_numbers"}:
        raise InputError(
            "features declare nothing of items: a ranker needs a column of: item, path or log"
        )
    return inputs


def _checked(tasks: Sequence[str]) -> tuple[str, ...]:
    if not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"tasks are [{', '.join(tasks)}]: expected one or more, each once")
    return tuple(tasks)


def _read_by(width: int, dim: int) -> nn.Module:
    """Return what reads a retriever's query: its score alone does not say how sure it is."""
    return nn.Sequential(nn.Linear(width, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
