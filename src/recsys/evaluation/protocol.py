"""Full-ranking evaluation, streamed: every item is ranked for every user, one batch at a time.

Shapes: Q requests (one a user), B requests of a batch, N items, S seen pairs, K places of a list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys import peers
from recsys.data.dataset import Dataset
from recsys.evaluation.scorers import EvaluationBatch, Scorer
from recsys.history import Histories
from recsys.metrics import (
    METRICS,
    coverage,
    exposure,
    mean_popularity,
    metric,
    ranks,
    ranks_without,
)
from recsys.schema import InputError

KS = (1, 5, 10, 20, 50, 100)
Predicted = Literal["validation", "test"]
HISTORY_FROM = (0, 5, 10, 20, 50, 100)
"""Where the buckets of history length begin."""
HEAD, MIDDLE = 1 / 3, 2 / 3
"""Head, middle and tail items each hold a third of the training events."""
METADATA = b"recsys.evaluation"


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table through a neighbour file, so that a reader never sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


class Requests(NamedTuple):
    """Each predicted user, the place and item of the event to predict, and its time: int64 [Q]."""

    users: NDArray[np.int64]
    places: NDArray[np.int64]
    targets: NDArray[np.int64]
    now: NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """How well a scorer ranks one part of a dataset.

    metrics: means over users, `ndcg@10` by the protocol, and beside it `with_seen/ndcg@10` (or
    `without_seen/…`) by the other one. slices: the same by group and bucket, with the number of
    `users`. per_user: user, user_id, target, rank, rank_with_seen, rank_without_seen,
    history_length, and one column of labels a slice; None where details were not asked for.
    """

    scorer: str
    dataset: str
    fingerprint: str
    part: str
    exclude_seen: bool
    users: int
    seconds: float
    metrics: dict[str, float]
    slices: dict[str, dict[str, dict[str, float]]]
    per_user: pa.Table | None

    @property
    def protocol(self) -> dict[str, Any]:
        """What two evaluations must share before their numbers may be compared."""
        return {
            "dataset": f"{self.dataset} ({self.fingerprint})",
            "part": self.part,
            "exclude_seen": self.exclude_seen,
        }

    def save(self, path: Path) -> None:
        """Write the per-user table as Parquet, with everything else in its metadata."""
        assert self.per_user is not None, "evaluate with details=True to save"
        facts = {k: v for k, v in vars(self).items() if k != "per_user"}
        table = self.per_user.replace_schema_metadata({METADATA: json.dumps(facts)})
        write_parquet(path, table)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what `save` wrote; raises InputError where the file is missing or another one."""
        if not path.is_file():
            raise InputError(f"{path}: no such file; make it with `recsys evaluate`")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not Parquet ({error}); run `recsys evaluate`") from error
        facts = (table.schema.metadata or {}).get(METADATA)
        if facts is None:
            raise InputError(f"{path}: no per-user ranks of recsys; run `recsys evaluate`")
        return cls(**json.loads(facts), per_user=table)


def evaluate(
    dataset: Dataset,
    scorer: Scorer,
    part: Predicted,
    *,
    exclude_seen: bool = True,
    ks: Sequence[int] = KS,
    batch_size: int = 512,
    details: bool = True,
    shared: bool = False,
) -> Evaluation:
    """Rank all items for every user with an event to predict, given all events before it.

    `exclude_seen` takes the items of the history from the candidates, but never the target. Memory
    is batch × items. Without `details`: recall, NDCG and MRR only, for use after each epoch.
    `shared`: every process of a training calls it, and each ranks its share of the users.
    Raises InputError where nobody has such an event, or a score is NaN.
    """
    started = perf_counter()
    _check(ks, batch_size)
    asked = requests(dataset, part)
    share = (peers.rank(), peers.world()) if shared else (0, 1)
    ranked = _rank(dataset, scorer, asked, ks if details else (), exclude_seen, batch_size, share)
    metrics = _means(ranked.main(exclude_seen), ks) | _beside(ranked, exclude_seen, ks)
    groups = _groups(dataset, asked) if details else {}
    main_Q = ranked.main(exclude_seen)
    return Evaluation(
        scorer=scorer.name,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        part=part,
        exclude_seen=exclude_seen,
        users=len(asked.users),
        metrics=metrics | (_catalogue(dataset, ranked.shown_KN, ks) if details else {}),
        slices={group: _sliced(main_Q, labels, ks) for group, labels in groups.items()},
        per_user=_per_user(dataset, asked, main_Q, ranked, groups) if details else None,
        seconds=perf_counter() - started,
    )


def requests(dataset: Dataset, part: Predicted) -> Requests:
    """Return what the split asks for: one request a user who has an event to predict.

    Raises InputError for an unknown part, and where there is none.
    """
    if part not in ("validation", "test"):
        raise InputError(f"cannot evaluate on {part!r}; expected validation or test")
    places_U = getattr(dataset.split, part)
    users_Q = np.flatnonzero(places_U >= 0)
    if len(users_Q) == 0:
        raise InputError(
            f"dataset {dataset.name}: no user has a {part} event under its split "
            f"{dataset.manifest['split']['rule']}; prepare it with more events a user, "
            "or with split=leave_one_out"
        )
    places_Q = places_U[users_Q].astype(np.int64)
    events_Q = dataset.offsets[users_Q] + places_Q
    columns = (np.asarray(dataset.events[c][events_Q], np.int64) for c in ("items", "times"))
    return Requests(users_Q, places_Q, *columns)


def _check(ks: Sequence[int], batch_size: int) -> None:
    if not ks or min(ks) < 1:
        raise InputError(f"evaluation.ks={list(ks)}: expected numbers of at least 1, as in 10")
    if batch_size < 1:
        raise InputError(f"evaluation.batch_size={batch_size}: expected at least 1, as in 512")


class _Ranked(NamedTuple):
    """Ranks among all items and among those not seen: float64 [Q]; `exposure` for each k."""

    with_seen_Q: Tensor
    without_seen_Q: Tensor
    shown_KN: Tensor

    def main(self, exclude_seen: bool) -> Tensor:
        return self.without_seen_Q if exclude_seen else self.with_seen_Q


def _rank(
    dataset: Dataset,
    scorer: Scorer,
    asked: Requests,
    ks: Sequence[int],
    exclude_seen: bool,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> _Ranked:
    # Histories of like length together: little of a batch is then padding.
    order_Q = np.argsort(asked.places, kind="stable")
    part, parts = share
    asked = Requests(*(column[order_Q[part::parts]] for column in asked))
    with_seen, without_seen = ([torch.zeros(0, dtype=torch.float64)] for _ in range(2))
    shown_KN = torch.zeros(len(ks), dataset.num_items + 1, dtype=torch.int64)
    for batch, targets_B in _batches(dataset, asked, batch_size):
        scores_BN = _scores(dataset, scorer, batch)
        seen = _seen(batch.histories, targets_B, scores_BN)
        at_B = torch.from_numpy(targets_B - 1).to(scores_BN.device)
        all_B = ranks(scores_BN, at_B)
        with_seen.append(all_B.cpu())
        without_seen.append(ranks_without(all_B, scores_BN, at_B, *seen).cpu())
        if ks:
            top_BK = _top(scores_BN, max(ks), seen if exclude_seen else None)
            shown_KN += torch.stack([exposure(top_BK[:, :k], dataset.num_items) for k in ks])
    with_Q, without_Q = (
        _put_back(torch.cat(some), order_Q, parts) for some in (with_seen, without_seen)
    )
    return _Ranked(with_Q, without_Q, shown_KN if parts == 1 else peers.total(shown_KN))


def _put_back(mine: Tensor, order_Q: NDArray[np.int64], parts: int) -> Tensor:
    """Return the values of all requests in their own order, of each part's every `parts`-th."""
    values = [mine] if parts == 1 else peers.gathered(mine)
    places = np.concatenate([order_Q[part::parts] for part in range(parts)])
    found_Q = torch.empty(len(order_Q), dtype=torch.float64)
    found_Q[torch.from_numpy(places)] = torch.cat(values).double()
    return found_Q


def _batches(
    dataset: Dataset, asked: Requests, batch_size: int
) -> Iterator[tuple[EvaluationBatch, NDArray[np.int64]]]:
    for start in range(0, len(asked.users), batch_size):
        some = Requests(*(column[start : start + batch_size] for column in asked))
        histories = dataset.histories(some.users, some.places)
        yield EvaluationBatch(some.users, histories, some.now), some.targets


def _scores(dataset: Dataset, scorer: Scorer, batch: EvaluationBatch) -> Tensor:
    """Return the scores of real items [B, N]: item i is in column i - 1."""
    scores_BN = scorer.score(batch)
    expected = (len(batch), dataset.num_items + 1)
    if tuple(scores_BN.shape) != expected:
        raise InputError(
            f"{scorer.name} gave scores of shape {tuple(scores_BN.shape)}, expected {expected} for "
            f"dataset {dataset.name}; evaluate on the dataset that it was trained on"
        )
    return scores_BN[:, 1:]


def _seen(
    histories: Histories, targets_B: NDArray[np.int64], scores_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the distinct (row, column) of each history's items in the scores, targets left out."""
    columns = np.asarray(histories.items, np.int64) - 1
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    rows_S, columns_S = np.divmod(
        np.unique(rows * scores_BN.shape[1] + columns), scores_BN.shape[1]
    )
    kept = columns_S + 1 != targets_B[rows_S]
    to = scores_BN.device
    return torch.from_numpy(rows_S[kept]).to(to), torch.from_numpy(columns_S[kept]).to(to)


def _top(scores_BN: Tensor, k: int, removed: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the best items, 0 where a list is shorter: int64 [B, K], on the CPU."""
    never = scores_BN.new_tensor(-torch.inf)
    if removed is not None:
        scores_BN = scores_BN.index_put(removed, never)
    best_BK, columns_BK = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1)
    return torch.where(best_BK > never, columns_BK + 1, 0).cpu()


def _means(ranks_Q: Tensor, ks: Sequence[int]) -> dict[str, float]:
    names = [f"{kind}@{k}" for kind in METRICS for k in ks]
    return {name: float(metric(name, ranks_Q).mean()) for name in names}


def _beside(ranked: _Ranked, exclude_seen: bool, ks: Sequence[int]) -> dict[str, float]:
    prefix = "with_seen" if exclude_seen else "without_seen"
    return {f"{prefix}/{k}": v for k, v in _means(ranked.main(not exclude_seen), ks).items()}


def _catalogue(dataset: Dataset, shown_KN: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Return coverage and mean popularity of what is recommended within the first k."""
    share_N = torch.from_numpy(dataset.train_count / max(1, dataset.train_count.sum()))
    pairs = list(zip(ks, shown_KN, strict=True))
    return {f"coverage@{k}": coverage(shown_N) for k, shown_N in pairs} | {
        f"popularity@{k}": mean_popularity(shown_N, share_N) for k, shown_N in pairs
    }


def popularity_buckets(train_count_N: NDArray[np.int64]) -> NDArray[np.str_]:
    """Label items so that head, middle and tail each hold a third of the training events.

    An item without any is a newcomer.

    >>> popularity_buckets(np.array([6, 5, 3, 3, 1, 0])).tolist()
    ['head', 'middle', 'middle', 'tail', 'tail', 'newcomer']
    """
    order = np.argsort(-train_count_N, kind="stable")
    counts = train_count_N[order]
    before = (np.cumsum(counts) - counts) / max(1, counts.sum())
    labels = np.empty(len(counts), dtype="<U8")
    labels[order] = np.select(
        [counts == 0, before < HEAD, before < MIDDLE], ["newcomer", "head", "middle"], "tail"
    )
    return labels


def history_buckets(lengths: NDArray[np.int64]) -> NDArray[np.str_]:
    """Label history lengths by the bucket they fall into.

    >>> history_buckets(np.array([1, 5, 9, 100])).tolist()
    ['0-4', '5-9', '5-9', '100+']
    """
    ends = [f"{a}-{b - 1}" for a, b in pairwise(HISTORY_FROM)] + [f"{HISTORY_FROM[-1]}+"]
    return np.array(ends)[np.searchsorted(HISTORY_FROM, lengths, side="right") - 1]


def _groups(dataset: Dataset, asked: Requests) -> dict[str, NDArray[np.str_]]:
    """Return each slicing's label of every request: its name → [Q]."""
    known = dataset.split.train_end[asked.users] > 0
    return {
        "history": history_buckets(asked.places),
        "item": popularity_buckets(dataset.train_count[1:])[asked.targets - 1],
        "user": np.where(known, "known", "newcomer"),
    }


def _sliced(
    ranks_Q: Tensor, labels_Q: NDArray[np.str_], ks: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return number of users and metrics of each bucket, in the buckets' own order."""
    order = [*history_buckets(np.array(HISTORY_FROM)), "head", "middle", "tail", "known"]
    labels = sorted(set(labels_Q.tolist()), key=[*order, "newcomer"].index)
    masks = {label: torch.from_numpy(labels_Q == label) for label in labels}
    return {
        label: {"users": float(mask_Q.sum())} | _means(ranks_Q[mask_Q], ks)
        for label, mask_Q in masks.items()
    }


def _per_user(
    dataset: Dataset,
    asked: Requests,
    main_Q: Tensor,
    ranked: _Ranked,
    groups: dict[str, NDArray[np.str_]],
) -> pa.Table:
    columns = {
        "user": asked.users.astype(np.int32),
        "user_id": dataset.users["user_id"].take(asked.users),
        "target": asked.targets.astype(np.int32),
        "rank": main_Q.numpy(),
        "rank_with_seen": ranked.with_seen_Q.numpy(),
        "rank_without_seen": ranked.without_seen_Q.numpy(),
        "history_length": asked.places.astype(np.int32),
    }
    return pa.table(columns | {f"{group}_bucket": pa.array(v) for group, v in groups.items()})
