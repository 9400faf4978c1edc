"""Adam by rows: what torch's own sparse and dense ones do, and it goes on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recsys.launch import configure
from recsys.optimizers import SMALL, LazyAdam
from recsys.schema import InputError
from recsys.training.retrieval import check_lazy

READ = [torch.tensor(rows) for rows in ([1, 1, 5], [5, 9], [2], [1, 9, 9, 9], [0, 7])]


class Net(nn.Module):
    """A table, and a layer that all rows go through."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.layer = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(self.table(rows)).square().sum()


def stepped(net: Net, optimizers: list[torch.optim.Optimizer], read: list[Tensor]) -> Net:
    for rows in read:
        net.zero_grad()
        net(rows).backward()
        for optimizer in optimizers:
            optimizer.step()
    return net


def assert_same(left: Net, right: Net) -> None:
    for one, other in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_move_as_in_sparse_adam_and_the_rest_as_in_adam() -> None:
    ours, theirs = Net(), Net()
    stepped(ours, [LazyAdam(ours.parameters(), lr=0.1)], READ)
    parts = (
        torch.optim.SparseAdam(theirs.table.parameters(), lr=0.1),
        torch.optim.Adam(theirs.layer.parameters(), lr=0.1),
    )
    assert_same(ours, stepped(theirs, list(parts), READ))


def test_rows_that_nobody_reads_stay() -> None:
    start, net = Net(), Net()
    stepped(net, [LazyAdam(net.parameters(), lr=0.1)], READ)
    moved = (net.table.weight != start.table.weight).any(1)
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 5, 7, 9]


def test_dense_gradients_are_adams() -> None:
    ours, theirs = Net(sparse=False), Net(sparse=False)
    stepped(ours, [LazyAdam(ours.parameters(), lr=0.1)], READ)
    assert_same(ours, stepped(theirs, [torch.optim.Adam(theirs.parameters(), lr=0.1)], READ))


def test_it_goes_on_from_its_state() -> None:
    whole, first = Net(), Net()
    stepped(whole, [LazyAdam(whole.parameters(), lr=0.1)], READ)
    half = LazyAdam(first.parameters(), lr=0.1)
    stepped(first, [half], READ[:3])
    second = Net()
    second.load_state_dict(first.state_dict())
    resumed = LazyAdam(second.parameters(), lr=0.1)
    resumed.load_state_dict(half.state_dict())
    assert_same(whole, stepped(second, [resumed], READ[3:]))


def test_large_tables_give_gradients_by_rows() -> None:
    model = nn.ModuleList([nn.Embedding(SMALL, 1), nn.Embedding(SMALL + 1, 1)])
    LazyAdam.prepare(model)
    assert [module.sparse for module in model] == [False, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("loss=full_softmax", "no effect with loss=full_softmax.*use loss=sampled_softmax"),
        ("loss=sampled_softmax trainer=ddp", "for one process.*embedding=sharded"),
    ],
)
def test_where_it_is_of_no_use(settings: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_lazy(configure(["optimizer=lazy_adam", *settings.split()]))
    check_lazy(configure(["optimizer=lazy_adam", "loss=sampled_softmax"]))
