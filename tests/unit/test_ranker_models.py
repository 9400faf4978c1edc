"""The ranker: every choice of its parts learns what it must, and exports as it computes.

Shapes: B requests, C candidates, L path length, T tasks, W codes, G numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from recsys.config import config_dir
from recsys.export.onnx import export_ranker
from recsys.export.ranker import embeddings_of_added
from recsys.export.runtime import open_session
from recsys.features import Field, ItemTable, Layout
from recsys.history import GAP_BUCKETS, VALUE_BUCKETS
from recsys.launch import configure
from recsys.models import Calibrated, Ranker
from recsys.models.calibration import Calibration
from recsys.models.chances import ITEMS, RetrievalChances
from recsys.models.crossing import LowRankCross, SplitLinear
from recsys.models.heads import Funnel, chained
from recsys.models.ranker import Codes
from recsys.models.target import WeighedSums
from recsys.schema import EVENT_TYPES, InputError
from recsys.task_losses import Uncertainty, multi_task, softmax_in_request, task_losses

CHOICE = re.compile(r"[a-z.]+=(?:\[.*?\]|\w+)")
GROUPS = ("crossing", "path", "heads")
SHIPPED = {
    group: sorted(path.stem for path in (config_dir() / "model" / group).glob("*.yaml"))
    for group in GROUPS
}
CHOICES = [f"{group}={name}" for group, names in SHIPPED.items() for name in names]
PATHS = [name for name in SHIPPED["path"] if name != "none"]
FURTHER = ["heads.esmm=true", "crossing.structure=parallel", "heads=ple,heads.levels=2"]
TASKS = ("view", "cart", "purchase", "dwell")
LAYOUT = Layout(
    request_codes=(Field("region", 5), Field("interests", 6, 3)),
    request_numbers=("age",),
    item_codes=(Field("item_id", 20), Field("genres", 7, 2), Field("category", 6)),
    item_numbers=("price", "rate"),
    cross_numbers=("seen",),
    vector_width=4,
)
VECTORS = ("item_vectors", "candidate_vectors")
EMPTY = Layout(item_codes=(Field("item_id", 9),))


def made(choice: str = "", layout: Layout = LAYOUT, **settings: Any) -> Ranker:
    """Return the ranker of the shipped YAML with some choices, as in `heads=ple,path=none`."""
    torch.manual_seed(0)
    return instantiate(composed(choice))(layout, **({"tasks": TASKS} | settings))


@cache
def composed(choice: str) -> Any:
    choices = [f"model.{c}" if "." in c else f"model/{c}" for c in CHOICE.findall(choice)]
    return configure(["model=ranker", *choices]).model


def random_batch(
    model: Ranker | Calibrated, layout: Layout, sizes: tuple[int, int, int], seed: int = 0
) -> dict[str, Tensor]:
    """Return random arrays for B, C and L; the first path is empty."""
    rng = np.random.default_rng(seed)
    batch, candidates, length = sizes
    number = lambda *shape: np.where(rng.random(shape) < 0.2, np.nan, rng.normal(size=shape))  # noqa: E731
    lengths = rng.integers(1, length + 1, batch)
    lengths[0] = 0
    arrays = {
        "request_codes": codes(rng, layout.request_codes, (batch,)),
        "request_numbers": number(batch, len(layout.request_numbers)),
        "item_codes": codes(rng, layout.item_codes, (batch, candidates)),
        "item_numbers": number(batch, candidates, len(layout.item_numbers)),
        "cross_numbers": number(batch, candidates, len(layout.cross_numbers)),
        "item_vectors": rng.normal(size=(batch, candidates, layout.vector_width)),
        "retrieval_scores": 10 * rng.normal(size=(batch, candidates)),
        "queries": rng.normal(size=(batch, 2, 6)),
        "candidate_vectors": rng.normal(size=(batch, candidates, 6)),
        "path_codes": codes(rng, layout.item_codes, (batch, length)),
        "types": rng.integers(0, len(EVENT_TYPES) + 1, (batch, length)),
        "gaps": rng.integers(0, GAP_BUCKETS, (batch, length)),
        "values": rng.integers(0, VALUE_BUCKETS, (batch, length)),
        "lengths": lengths,
    }
    tensors = {name: torch.from_numpy(arrays[name]) for name in model.inputs}
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def codes(rng: np.random.Generator, fields: tuple[Field, ...], shape: tuple[int, ...]) -> Any:
    nothing = np.zeros((*shape, 0), np.int64)
    return np.concatenate(
        [nothing] + [rng.integers(0, f.size, (*shape, f.width)) for f in fields], axis=-1
    )


@torch.no_grad()
def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(*(batch[name] for name in model.inputs))  # type: ignore[union-attr]


@pytest.mark.parametrize("choice", ["", *CHOICES, *FURTHER])
def test_every_choice_answers_each_candidate_alone(choice: str) -> None:
    model = made(choice)
    batch = random_batch(model, LAYOUT, (3, 5, 4))
    together = answer(model, batch)
    assert together.shape == (3, 5, len(TASKS))
    assert together.isfinite().all()
    by_candidate = {"item_codes", "item_numbers", "cross_numbers", "item_vectors"}
    alone = [
        answer(model, {n: t[:, c : c + 1] if n in by_candidate else t for n, t in batch.items()})
        for c in range(5)
    ]
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_padding_says_nothing(path: str) -> None:
    model = made(f"path={path}", values=True)
    batch = random_batch(model, LAYOUT, (4, 3, 6))
    padded = {n: batch[n].clone() for n in batch}
    outside = torch.arange(6) >= batch["lengths"][:, None]
    for name in ("path_codes", "types", "gaps", "values"):
        padded[name][outside] = 1
    assert torch.allclose(answer(model, batch), answer(model, padded), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_items_met_again_are_looked_up_once_in_training_to_the_same_end(path: str) -> None:
    model = made(f"path={path}", dropout=0.0, values=True)
    batch = random_batch(model, LAYOUT, (4, 3, 6))
    batch["path_codes"][1:] = batch["path_codes"][:1]
    places_BL = torch.arange(6).expand(4, -1)
    once = {**batch, "path_codes": batch["path_codes"][0], "path_places": places_BL}
    with torch.no_grad():
        trained = model.train().answer(once)
    assert torch.allclose(trained, answer(model, batch), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_reads_what_events_were_worth_but_the_newest(path: str) -> None:
    model = made(f"path={path}", values=True)
    batch = random_batch(model, LAYOUT, (4, 3, 6))
    before, (rows, newest) = answer(model, batch), (torch.arange(4), batch["lengths"] - 1)
    batch["values"][rows[1:], newest[1:]] = 7
    assert torch.equal(answer(model, batch), before), "it is not known before the event ends"
    several = batch["lengths"] > 1
    batch["values"][several, 0] = (batch["values"][several, 0] + 1) % VALUE_BUCKETS
    assert ((answer(model, batch) != before).flatten(1).any(1) == several).all()


def test_dins_gradients_are_those_of_its_sums() -> None:
    (rows, length, candidates, hidden, width) = (3, 5, 2, 4, 6)
    there = (torch.rand(rows, length, 1) > 0.3).double()
    shapes = [(rows, length, width), (rows, candidates, hidden, width), (rows, candidates, hidden)]
    given = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in (*shapes, (1, hidden), (1,))
    ]
    sums = lambda key, *rest: WeighedSums.apply(key, there, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(sums, given)
    asked = torch.einsum("bla,bcha->blch", *given[:2]) + given[2][:, None]
    weight = (asked.relu() @ given[3][0] + given[4]) * there
    torch.testing.assert_close(sums(*given), torch.einsum("blc,bla->bca", weight, given[0]))


def test_reads_only_what_there_is() -> None:
    assert made("path=none", EMPTY).inputs == ("item_codes",)
    assert made("", EMPTY, gaps=False).inputs == ("item_codes", "path_codes", "types", "lengths")
    full = made("", LAYOUT, retriever=6)
    assert "retrieval_scores" in full.inputs
    assert answer(full, random_batch(full, LAYOUT, (2, 3, 4))).isfinite().all()
    for model in (made("path=none", EMPTY), made("", EMPTY)):
        assert answer(model, random_batch(model, EMPTY, (2, 3, 4))).shape == (2, 3, len(TASKS))


@pytest.mark.parametrize("items", [30, 5_000])
def test_a_retrievers_scores_are_read_as_logs_of_probabilities(items: int) -> None:
    torch.manual_seed(0)
    vectors_ND = torch.randn(items + 1, 8) / 2
    sizes = (9, 9, 6)
    codes_NW = torch.stack([torch.randint(0, size, (items + 1,)) for size in sizes], dim=1)
    chances = RetrievalChances(8, Layout(item_codes=(Field("genres", 9, 2), Field("aisle", 6))))
    chances.fit(vectors_ND, codes_NW)
    query_BHD, candidates_BC = torch.randn(4, 2, 8), torch.randint(1, items + 1, (4, 7))
    score_BN = (query_BHD @ vectors_ND.T).amax(1)
    score_BC = score_BN.gather(1, candidates_BC)
    score_BC[0] = torch.nan  # as where nobody has a history
    batch = {"queries": query_BHD, "retrieval_scores": score_BC}
    found = chances(batch | {"item_codes": codes_NW[candidates_BC]})
    chance_BN = score_BN[:, 1:].softmax(-1)
    assert found[0].isnan().all()
    # Exact where the catalogue is small, else by some hundreds of its items.
    within = 1e-5 if items <= ITEMS else 0.5
    for b, c in np.ndindex(3, 7):
        item = candidates_BC[b + 1, c]
        aisle_N = codes_NW[1:, 2] == codes_NW[item, 2]
        chance_N = chance_BN[b + 1]
        expected = [math.log(chance_N[item - 1]), math.log(chance_N[aisle_N].sum())]
        assert found[b + 1, c].tolist() == pytest.approx(expected, abs=within)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: made("", Layout(cross_numbers=("seen",))), "model/path=none"),
        (lambda: made("path=none", Layout(request_numbers=("age",))), "nothing of items"),
        (lambda: made(tasks=["view", "view"]), "each once"),
        (lambda: made(tasks=[]), "expected one or more"),
        (lambda: made("heads.esmm=true", tasks=["view"]), "has no effect"),
        (lambda: made("heads.esmm=[view,purchse]"), "did you mean 'purchase'"),
        (lambda: made("crossing.structure=both"), "parallel or stacked"),
        (lambda: made("crossing=mlp,crossing.hidden=[]"), "expected widths"),
        (lambda: made("path.heads=3"), "multiple of"),
    ],
)
def test_a_wrong_setting_says_so(make: Callable[[], Ranker], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_several_places_pool_to_the_mean_of_what_is_there() -> None:
    table = Codes((), (Field("genres", 4, 3), Field("kind", 2)), 2)
    nothing, one, two = table(
        "item_codes", torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0], [2, 3, 0, 0]])
    )
    weight = table.table.weight
    assert nothing[:2].tolist() == [0, 0]
    assert torch.equal(one[:2], weight[3])
    assert torch.allclose(two[:2], (weight[3] + weight[4]) / 2)
    assert torch.equal(one[2:], weight[5]), "a missing single code has a vector of its own"


def test_a_split_layer_is_the_layer_on_both_sides_joined() -> None:
    split = SplitLinear(3, 4, 2)
    request, candidate = torch.randn(2, 1, 3), torch.randn(2, 5, 4)
    weight = torch.cat([split.request.weight, split.candidate.weight], dim=1)
    joined = torch.cat([request.expand(-1, 5, -1), candidate], dim=-1)
    assert torch.allclose(
        split(request, candidate), joined @ weight.T + split.request.bias, atol=1e-6
    )


# A known answer: labels that no linear model of the fields can learn.


def test_cross_layers_are_their_formula_on_the_candidates_side() -> None:
    """Each layer adds the plain features times U V of request and crossed features together."""
    torch.manual_seed(0)
    cross = LowRankCross(3, 5, layers=2, rank=4)
    cross.bias.data.normal_()
    request, plain = torch.randn(2, 1, 3), torch.randn(2, 7, 5)
    crossed, added = plain, cross.bias
    for narrow, widen in zip(cross.narrow, cross.widen, strict=True):
        both = torch.cat([request.expand(-1, 7, -1), crossed], dim=-1)
        weight = torch.cat([narrow.request.weight, narrow.candidate.weight], dim=1)
        added = added + (both @ weight.T + narrow.request.bias) @ widen
        crossed = plain * added
    torch.testing.assert_close(cross(request, plain), crossed)


def crossed_problem(rows: int = 512) -> tuple[Layout, dict[str, Tensor], Tensor]:
    """Return requests liking an item where region and category agree in parity."""
    rng = np.random.default_rng(0)
    layout = Layout(request_codes=(Field("region", 4),), item_codes=(Field("category", 4),))
    region, category = rng.integers(0, 4, (rows, 1)), rng.integers(0, 4, (rows, 1, 1))
    label = ((region + category[:, 0]) % 2 == 0).astype(np.float32)[..., None]
    arrays = {"request_codes": region, "item_codes": category}
    arrays |= empty_path(rows, 1)
    return layout, {n: torch.from_numpy(a) for n, a in arrays.items()}, torch.from_numpy(label)


def path_problem(rows: int = 512) -> tuple[Layout, dict[str, Tensor], Tensor]:
    """Return requests liking an item of the category that the path's newest item has."""
    rng = np.random.default_rng(0)
    layout = Layout(item_codes=(Field("category", 5),))
    lengths = rng.integers(1, 7, rows)
    path = rng.integers(1, 5, (rows, 6, 1))
    newest = path[np.arange(rows), lengths - 1, 0]
    category = np.where(rng.random(rows) < 0.5, newest, rng.integers(1, 5, rows))
    label = (category == newest).astype(np.float32)[:, None, None]
    arrays = {"item_codes": category[:, None, None], **empty_path(rows, 6), "path_codes": path}
    arrays["lengths"] = lengths
    return layout, {n: torch.from_numpy(a) for n, a in arrays.items()}, torch.from_numpy(label)


def empty_path(rows: int, width: int) -> dict[str, Any]:
    return {
        "path_codes": np.zeros((rows, width, 1), np.int64),
        "types": np.ones((rows, width), np.int64),
        "gaps": np.ones((rows, width), np.int64),
        "lengths": np.zeros(rows, np.int64),
    }


def learned_auc(choice: str, problem: Any, steps: int = 30) -> float:
    layout, batch, label = problem
    model = made(choice, layout, tasks=["view", "purchase"])
    labels = label.expand(-1, -1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        logit = model(*(batch[name] for name in model.inputs))
        optimizer.zero_grad()
        multi_task(logit, labels, tasks=model.tasks).backward()
        optimizer.step()
    return auc(answer(model, batch)[..., 1].flatten(), label.flatten())


def auc(score: Tensor, label: Tensor) -> float:
    higher = score[label > 0][:, None] - score[label == 0][None]
    return ((higher > 0).float() + 0.5 * (higher == 0)).mean().item()


@pytest.mark.parametrize("choice", ["", *CHOICES, *FURTHER])
def test_every_choice_learns_a_crossing(choice: str) -> None:
    choice = choice.replace("heads.esmm=true", "heads.esmm=true,path=none")
    assert learned_auc(choice, crossed_problem()) > 0.95


@pytest.mark.parametrize("choice", ["", *CHOICES, *FURTHER])
def test_every_choice_learns_from_the_path_if_it_reads_one(choice: str) -> None:
    # DIN sums the path: that the newest event is another kind of evidence takes it longer.
    reached = learned_auc(choice, path_problem(), 100 if choice == "path=din" else 60)
    # A mean does not tell the newest event from the others.
    least, most = {"path=none": (0.0, 0.6), "path=mean": (0.7, 0.95)}.get(choice, (0.95, 1.0))
    assert least < reached <= most


# Losses.


def test_losses_by_hand() -> None:
    """One request of two candidates: view known of both, purchase of the first, dwell 9 s."""
    nan = math.nan
    logits = torch.tensor([[[0.0, math.log(3), 1.0], [math.log(4), 7.0, 9.0]]])
    labels = torch.tensor([[[1.0, 0.0, 9.0], [0.0, nan, nan]]])
    tasks = ("view", "purchase", "dwell")
    view = (math.log(2) + math.log(5)) / 2
    purchase = math.log(4)
    off = math.log(10) - 1
    table = torch.tensor([view, purchase, off - 0.5])
    assert torch.allclose(task_losses(logits, labels, tasks=tasks), table)
    squared = task_losses(logits, labels, tasks=tasks, dwell="squared")
    assert squared[2].item() == pytest.approx(off**2)
    weighed = multi_task(logits, labels, tasks=tasks, weights={"purchase": 2, "dwell": 0})
    assert weighed.item() == pytest.approx(view + 2 * purchase)
    learned = Uncertainty(tasks)
    learned.log_variance.data[:] = torch.tensor([0.0, math.log(2), 1.0])
    wanted = view + purchase / 2 + (off - 0.5) / 2 / math.e + math.log(2) / 2 + 0.5
    assert multi_task(logits, labels, tasks=tasks, uncertainty=learned).item() == pytest.approx(
        wanted
    )


def test_a_request_s_softmax_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3), 5.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([[1.0, 0.0, math.nan], [0.0, 0.0, 0.0]])
    assert softmax_in_request(logits, labels).item() == pytest.approx(math.log(4))
    both = multi_task(logits[..., None], labels[..., None], tasks=["view"], listwise=0.5)
    alone = multi_task(logits[..., None], labels[..., None], tasks=["view"])
    assert (both - alone).item() == pytest.approx(math.log(4) / 2)


@pytest.mark.parametrize("listwise", [0.0, 1.0])
def test_an_unknown_label_changes_nothing(listwise: float) -> None:
    """Not the loss, not the gradient; a task without any label has neither."""
    tasks, learned = ("view", "dwell", "cart"), Uncertainty(("view", "dwell", "cart"))
    labels = torch.tensor([[[1.0, 8.0], [0.0, math.nan], [math.nan, 3.0]]])
    labels = torch.cat([labels, torch.full((1, 3, 1), math.nan)], dim=-1)
    results = []
    for other in (0.3, -40.0):
        logits = torch.linspace(-1, 1, 9).view(1, 3, 3).masked_fill(labels.isnan(), other)
        logits.requires_grad_()
        loss = multi_task(logits, labels, tasks=tasks, uncertainty=learned, listwise=listwise)
        results.append((loss.item(), *torch.autograd.grad(loss, [logits, learned.log_variance])))
    (loss, by_logit, by_weight), (again, by_other, _) = results
    assert loss == again
    assert torch.equal(by_logit, by_other)
    assert (by_logit[labels.isnan()] == 0).all()
    assert by_weight[2] == 0
    assert (by_logit[~labels.isnan()] != 0).all()


def test_wrong_loss_settings_say_so() -> None:
    zero = torch.zeros(1, 1, 1)
    with pytest.raises(InputError, match="did you mean 'view'"):
        multi_task(zero, zero, tasks=["view"], weights={"veiw": 2})
    with pytest.raises(InputError, match="huber or squared"):
        multi_task(zero, zero, tasks=["dwell"], dwell="hubert")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no effect"):
        multi_task(
            zero, zero, tasks=["view"], weights={"view": 2}, uncertainty=Uncertainty(["view"])
        )


# The funnel and calibration.


def test_the_funnel_is_a_product_of_probabilities() -> None:
    logits = torch.randn(2, 3, 4) * 3
    funnel = chained(("purchase", "like", "view", "cart"), True)(logits)
    plain, chain = logits.double().sigmoid(), funnel.double().sigmoid()
    assert torch.allclose(chain[..., 2], plain[..., 2], atol=1e-6)
    assert torch.allclose(chain[..., 3], plain[..., 2] * plain[..., 3], atol=1e-6)
    assert torch.allclose(chain[..., 0], plain[..., [0, 2, 3]].prod(-1), atol=1e-6)
    assert torch.equal(funnel[..., 1], logits[..., 1])


@pytest.mark.parametrize("far", [-80.0, 80.0])
def test_the_funnel_is_stable_far_out(far: float) -> None:
    logits = torch.full((1, 1, 3), far, requires_grad=True)
    chain = Funnel([0, 1, 2], 3)(logits)
    (gradient,) = torch.autograd.grad(chain.sum(), logits)
    assert chain.isfinite().all()
    assert gradient.isfinite().all()
    wanted = [far, 2 * far, 3 * far] if far < 0 else [far - math.log(n) for n in (1, 2, 3)]
    assert chain.flatten().tolist() == pytest.approx(wanted, rel=1e-5)


def test_calibration_scales_shifts_and_draws_a_line() -> None:
    calibration = Calibration(["view", "dwell", "cart"])
    logits = torch.tensor([[[0.0, math.log(61), 1.0]]])
    assert calibration(logits)[0, 0, :2].tolist() == pytest.approx([0.5, 60])
    assert not calibration.has_lines
    calibration.set("cart", scale=2, shift=-1)
    calibration.set("view", knots=np.array([0.2, 0.4, 0.6]), values=np.array([0.1, 0.1, 0.7]))
    answers = calibration(logits)[0, 0]
    assert answers[0].item() == pytest.approx(0.4)
    assert calibration.has_lines
    assert answers[2].item() == pytest.approx(1 / (1 + math.exp(-1)))
    ends = calibration(torch.tensor([[[-9.0, 0, 0]], [[9.0, 0, 0]]]))[:, 0, 0]
    assert ends.tolist() == pytest.approx([0.1, 0.7])
    again = Calibration(["view", "dwell", "cart"])
    again.load_state_dict(calibration.state_dict())
    assert torch.equal(again(logits)[0, 0], answers)


# As ONNX.


def assert_exports(model: Calibrated, layout: Layout, path: Path) -> None:
    """Check the graph of a ranker that reads embeddings against the ranker that looks them up."""
    served = Calibrated(model.ranker, embedded=True).eval()
    export_ranker(served, layout, path)
    session = open_session(path)
    for sizes in ((1, 1, 1), (1, 200, 50), (3, 2, 7), (17, 5, 2)):
        batch = random_batch(model, layout, sizes, seed=1)
        wanted = answer(model, batch)
        batch["item_embeddings"] = embeddings(served, batch, batch["item_codes"], VECTORS)
        if "path_codes" in batch:
            batch["path_embeddings"] = embeddings(served, batch, batch["path_codes"], ())
        (met,) = session.run(None, {name: batch[name].numpy() for name in served.inputs})
        assert met.shape == wanted.shape
        assert np.abs(met - wanted.numpy()).max() < 1e-4, sizes


def embeddings(
    served: Calibrated, batch: dict[str, Tensor], codes_BCW: Tensor, read: tuple[str, ...]
) -> Tensor:
    """Return what is made of items alone; of a path's items no vectors are read."""
    count = codes_BCW.shape[:2].numel()
    vectors = [
        batch[name].flatten(0, 1).numpy()
        if name in read and name in batch
        else np.zeros((count, w))
        for name, w in zip(VECTORS, (LAYOUT.vector_width, 6), strict=True)
    ]
    given = codes_BCW.flatten(0, 1).numpy(), *(vector.astype(np.float32) for vector in vectors)
    return torch.from_numpy(served.item_embeddings(*given, rows=3)).unflatten(
        0, codes_BCW.shape[:2]
    )


def test_of_an_added_item_the_retrievers_vector_is_read(tmp_path: Path) -> None:
    layout = replace(LAYOUT, item_codes=LAYOUT.item_codes[1:])
    model = Calibrated(made("", layout, retriever=6)).eval()
    assert_exports(model, layout, tmp_path / "ranker.onnx")
    served = Calibrated(model.ranker, embedded=True).eval()
    rng = np.random.default_rng(2)
    codes_NW, vectors_NV = codes(rng, layout.item_codes, (4,)), rng.normal(size=(4, 4))
    nothing = np.zeros((4, 0))
    items = ItemTable(codes_NW, nothing, vectors_NV.astype(np.float32), nothing)
    vectors_AD = rng.normal(size=(3, 6)).astype(np.float32)
    unknown = np.zeros(3, np.int64)
    wanted = served.item_embeddings(codes_NW[unknown], items.vectors[unknown], vectors_AD)
    met = replace(items, added=embeddings_of_added(served, items, 6)).of_added(vectors_AD)
    np.testing.assert_allclose(met, wanted, atol=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01


def together() -> list[str]:
    """Return a few rankers that have every shipped choice in them: an export takes seconds."""
    most = max(len(names) for names in SHIPPED.values())
    names = [[f"{g}={n[at % len(n)]}" for g, n in SHIPPED.items()] for at in range(most)]
    beside = "crossing=dcnv2,crossing.structure=parallel,heads=ple,heads.levels=2,heads.esmm=true"
    return [*(",".join(choices) for choices in names[:-1]), f"{names[-1][1]},{beside}"]


@pytest.mark.parametrize("choice", together())
def test_every_choice_exports_as_it_computes(choice: str, tmp_path: Path) -> None:
    model = Calibrated(made(choice, retriever=6)).eval()
    assert_exports(model, LAYOUT, tmp_path / "ranker.onnx")


def test_lines_and_a_bare_layout_export(tmp_path: Path) -> None:
    ranker = made("", EMPTY).eval()
    ranker.calibration.set("view", knots=np.array([0.1, 0.9]), values=np.array([0.0, 0.5]))
    assert_exports(Calibrated(ranker).eval(), EMPTY, tmp_path / "ranker.onnx")
