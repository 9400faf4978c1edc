"""Look-ups answer and learn as PyTorch's own do, whatever the tables' sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recsys.models.lookups import Embedding, Run, row_sums, sums_over


@pytest.mark.parametrize("shape", [(6, 2), (300, 90)], ids=["few", "many"])
@pytest.mark.parametrize("sizes", [(5, 3), (5, 3, 4), (120, 90, 2, 7), (40_000, 30)], ids=str)
def test_row_sums_are_sums_of_lookups_with_their_gradients(
    sizes: tuple[int, ...], shape: tuple[int, int]
) -> None:
    tables = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in sizes]
    codes = [torch.randint(n, shape) for n in sizes]
    summed = row_sums(tables, codes)
    plain = sum(F.embedding(c, t) for t, c in zip(tables, codes, strict=True))
    assert isinstance(plain, torch.Tensor)
    torch.testing.assert_close(summed, plain)
    pull = torch.randn_like(summed)
    ours, theirs = (torch.autograd.grad(answer, tables, pull) for answer in (summed, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(6, 2), (300, 90)], ids=["few", "many"])
@pytest.mark.parametrize("sizes", [(5, 3), (120, 90, 2, 7), (40_000, 30)], ids=str)
def test_sums_over_what_is_there_leave_the_rest_out(
    sizes: tuple[int, ...], shape: tuple[int, int]
) -> None:
    tables = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in sizes]
    codes, there = [torch.randint(n, shape) for n in sizes], torch.rand(shape) > 0.3
    there[0] = False
    ours, plain = sums_over(tables, codes, there), row_sums(tables, codes)
    wanted = (plain * there[..., None]).sum(1)
    torch.testing.assert_close(ours, wanted)
    pull = torch.randn_like(wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad(answer, tables, pull) for answer in (ours, wanted))
    )


@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("shape", [(7,), (3, 4), (0,), (2, 3, 2)], ids=str)
def test_an_embedding_is_pytorchs(padding: int | None, shape: tuple[int, ...]) -> None:
    ours, theirs = Embedding(5, 3, padding_idx=padding), nn.Embedding(5, 3, padding_idx=padding)
    ours.load_state_dict(theirs.state_dict())
    index = torch.randint(5, shape)
    assert torch.equal(ours(index), theirs(index))
    pull = torch.randn(*shape, 3)
    for table in (ours, theirs):
        table(index).backward(pull)
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    with torch.no_grad():
        assert not ours(index).requires_grad


@pytest.mark.parametrize("rows", [4, 9_000], ids=["few", "many"])
@pytest.mark.parametrize("values", [range(0), range(10, 50)], ids=["read", "counted"])
def test_runs_of_rows_are_as_they_are_or_summed_with_their_gradients(
    values: range, rows: int
) -> None:
    table = Embedding(50, 3, padding_idx=0)
    index = torch.randint(10, 50, (rows, 2, 6))
    index[:, :, 2:] *= torch.randint(2, (rows, 2, 4))
    runs = [Run(2), Run(3, sums=True, values=values), Run(1)]
    vectors = F.embedding(index, table.weight, padding_idx=0)
    parts = vectors[..., :2, :].flatten(-2), vectors[..., 2:5, :].sum(-2), vectors[..., 5, :]
    plain, ours = torch.cat(parts, dim=-1), table.summed(index, runs)
    torch.testing.assert_close(ours, plain)
    pull = torch.randn_like(ours)
    gradients = [torch.autograd.grad(answer, table.weight, pull)[0] for answer in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(table.summed(index, runs), plain)


def test_an_embedding_gives_gradients_by_rows_where_it_is_to() -> None:
    table = Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
