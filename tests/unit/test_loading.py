"""Batches of data past memory, of several processes, and what is said where room runs out."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from recsys.artifacts import Workspace
from recsys.cli import main
from recsys.data import batches as module
from recsys.data.batches import IDLE, EventBatches, PackedBatches, PairBatches, Steps, share
from recsys.data.dataset import Dataset, by_time
from recsys.data.shuffle import Everywhere, Windows
from recsys.evaluation.baselines import baselines
from recsys.schema import InputError
from recsys.training.checkpoints import WholeCheckpoints
from recsys.training.memory import out_of_memory, what_to_lower
from recsys.training.module import RetrieverModule

KINDS = [PackedBatches, PairBatches]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, ring_csv: Path) -> Iterator[Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_HOME", str(tmp_path_factory.mktemp("loading")))
        assert main(["prepare", "data=events", f"data.path={ring_csv}"]) == 0
        yield Dataset(Workspace().find("dataset"))


def epoch_of(batches: EventBatches, epoch: int) -> np.ndarray:
    return np.concatenate(
        [
            batches.order.rows(epoch, step * batches.size, (step + 1) * batches.size)
            for step in range(batches.steps)
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_every_example_once_in_another_order_each_epoch(
    kind: type, dataset: Dataset
) -> None:
    batches = kind(dataset, size=7, seed=3, length=4, shuffle=300)
    first, second = (epoch_of(batches, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(batches.total))
    assert (first != second).any()
    assert (epoch_of(kind(dataset, size=7, seed=4, length=4, shuffle=300), 0) != first).any()


@pytest.mark.parametrize("total", [1, 7, 64, 1000])
def test_a_window_reads_few_runs_and_says_which_ahead(total: int) -> None:
    told: list[list[tuple[int, int]]] = []
    order = Windows(total, seed=0, block=8, count=3, ahead=told.append)
    for place in range(-(-total // 24)):
        rows = order.rows(0, place * 24, place * 24 + 24)
        runs = order.runs(0, place)
        assert runs in told[:-1]
        assert len(runs) <= 3
        inside = [(a <= rows) & (rows < b) if a < b else (rows >= a) | (rows < b) for a, b in runs]
        assert np.logical_or.reduce(inside).all()
    assert len(np.unique(order.rows(0, 0, total))) == total


@pytest.mark.parametrize("kind", KINDS)
def test_any_worker_and_any_resumption_makes_the_same_windows(kind: type, dataset: Dataset) -> None:
    batches = kind(dataset, size=50, seed=3, length=4, shuffle=300)
    plain = [batches[(0, step)] for step in range(batches.steps)]
    again = kind(dataset, size=50, seed=3, length=4, shuffle=300)
    worked = list(again.loader(2, Steps(again.steps, first=3)))
    assert len(worked) == len(plain) - 3
    for left, right in zip(plain[3:], worked, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
@pytest.mark.parametrize("shuffle", ["global", 300])
def test_windows_alone_are_read_without_what_lies_around(
    shuffle: str | int, dataset: Dataset
) -> None:
    """Else a miss reads megabytes, which push out what was asked for a window ahead."""
    mapped = Dataset(dataset.path)
    file = str(mapped.events["items"].filename)
    before = read_at_random(file)
    PackedBatches(mapped, size=7, seed=3, length=4, shuffle=shuffle)
    assert read_at_random(file) - before == (shuffle != "global")


def read_at_random(file: str) -> int:
    """Return how many maps of a file are told to be read at random."""
    regions = Path("/proc/self/smaps").read_text().split("VmFlags:")
    # The flags of a region stand before the next one.
    return sum(
        file in region and "rr" in following.split("\n")[0].split()
        for region, following in pairwise(regions)
    )


def test_nothing_is_held_for_each_example(dataset: Dataset) -> None:
    batches = PairBatches(dataset, size=7, seed=3, length=4, shuffle=100)
    held = [value for value in vars(batches).values() if isinstance(value, np.ndarray)]
    assert batches.total > dataset.num_users + 1
    assert [len(array) for array in held] == [dataset.num_users + 1]


def test_auto_shuffles_large_data_within_windows(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(PackedBatches(dataset, 7, 3, 4).order, Everywhere)
    assert len(baselines(dataset)) == 3
    events = len(dataset.events["items"])
    monkeypatch.setattr(module, "LARGE", events - 1)
    assert isinstance(PackedBatches(dataset, 7, 3, 4).order, Windows)
    assert isinstance(PackedBatches(dataset, 7, 3, 4, shuffle="global").order, Everywhere)


@pytest.mark.parametrize("shuffle", ["no", 0])
def test_an_unknown_shuffle_is_refused(shuffle: object, dataset: Dataset) -> None:
    with pytest.raises(InputError, match=f"batches.shuffle={shuffle}: expected auto, global, or"):
        PackedBatches(dataset, 7, 3, 4, shuffle=shuffle)  # type: ignore[arg-type]


def test_a_split_by_time_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 6, 50))])
    times = rng.integers(0, 100, offsets[-1])
    whole = by_time(offsets, times, 40, 70)
    monkeypatch.setattr("recsys.data.dataset.USERS", 7)
    pieces = by_time(offsets, times, 40, 70)
    expected = [int((times[a:b] < 40).sum()) for a, b in pairwise(offsets)]
    assert whole.train_end.tolist() == expected
    for name in ("train_end", "validation", "test"):
        assert (getattr(whole, name) == getattr(pieces, name)).all()


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(parts: int, dataset: Dataset) -> None:
    batches = PackedBatches(dataset, size=7, seed=3, length=4, horizon=3)
    for step in (0, batches.steps - 1):
        batches.part = (0, 1)
        whole = pairs_of(batches[(0, step)])
        found = []
        for part in range(parts):
            batches.part = (part, parts)
            made = batches[(0, step)]
            found += [] if IDLE in made else pairs_of(made)
        assert sorted(found) == sorted(whole)


def pairs_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    real = batch["segments"] > 0
    return list(zip(*(batch[name][real].tolist() for name in ("items", "targets")), strict=True))


def test_a_part_without_an_example_gets_anothers_which_is_marked(dataset: Dataset) -> None:
    batches = PairBatches(dataset, size=batches_of_one(dataset), seed=3, length=4)
    found = []
    for part in range(2):
        batches.part = (part, 2)
        found.append(batches[(0, batches.steps - 1)])
    assert [IDLE in batch for batch in found] == [True, False]
    assert torch.equal(found[0]["items"], found[1]["items"])


def batches_of_one(dataset: Dataset) -> int:
    """Return a batch size that leaves one example over."""
    total = PairBatches(dataset, 7, 3, 4).total
    return next(size for size in range(2, total) if total % size == 1)


def test_shares_cost_about_the_same() -> None:
    cost = np.random.default_rng(0).integers(1, 50, 200)
    shares = [share(cost, part, 4) for part in range(4)]
    assert [s.start for s in shares] == [0, *(s.stop for s in shares[:-1])]
    assert shares[-1].stop == 200
    assert max(abs(cost[s].sum() - cost.sum() / 4) for s in shares) <= 50


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    file, writer = tmp_path / "first" / "checkpoints" / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"weights": torch.ones(9)}, file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"no space left .* the one before is whole") as met:
            writer.save_checkpoint({"weights": torch.zeros(1_000_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "recsys train resume=first" in str(met.value)
    assert torch.load(file, weights_only=True)["weights"].sum() == 9
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_too_little_memory_says_what_to_lower(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def training_step(*_: object) -> torch.Tensor:
        return torch.empty(1 << 55)

    monkeypatch.setattr(RetrieverModule, "training_step", training_step)
    chosen = ["data.dataset=latest", "trainer=cpu", "logger=csv", "batches.size=48"]
    assert main(["train", *chosen]) == 2
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "Lower batches.size=24 (now 48), then loss.chunk=128" in said


def test_too_little_memory_of_a_gpu_says_by_how_much() -> None:
    said = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 "
    error = torch.OutOfMemoryError(f"{said}GiB of which 4.00 GiB is free.")
    assert out_of_memory(error)
    config = OmegaConf.create({"batches": {"size": 1024}, "loss": {"negatives": 512}})
    told = str(what_to_lower(error, config))
    assert "Lower batches.size=128 (now 1024), then loss.negatives=64" in told
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert out_of_memory(MemoryError())
