"""One contract for every index kind: what it finds is what brute force finds."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from recsys.index import build as building
from recsys.index import kinds
from recsys.index.build import IndexSettings, build
from recsys.index.delta import DeltaIndex, Within
from recsys.index.search import Gathered, Gone, ItemIndex, Masked
from recsys.index.shards import names
from recsys.index.tuning import exact_top
from recsys.schema import InputError

# B requests, H interests, D dim, N items
N, D = 3000, 16
KINDS = ("flat", "ivf_flat", "hnsw", "ivf_sq8", "ivf_pq")


def clustered(count: int, seed: int) -> np.ndarray:
    """Vectors around 40 centres, as an item catalogue's are; lengths differ a little."""
    centres = np.random.default_rng(7).normal(size=(40, D))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, 40, count)] + 0.4 * rng.normal(size=(count, D))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors * rng.uniform(0.8, 1.2, (count, 1))).astype(np.float32)


VECTORS_ND = clustered(N, 1)
QUERIES_BD = clustered(64, 2)


def exact(queries_HD, k, excluded=(), allowed=None):
    """Score everything, the slow and certain way: item indices and scores."""
    scores = (VECTORS_ND @ queries_HD.T).max(axis=1)
    eligible = np.arange(1, N + 1) if allowed is None else np.asarray(allowed)
    eligible = np.setdiff1d(eligible, excluded)
    order = np.lexsort((eligible, -scores[eligible - 1]))[:k]
    return eligible[order], scores[eligible[order] - 1]


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    with building.one_thread():
        yield


@pytest.fixture(scope="module", params=KINDS)
def index(request) -> ItemIndex:
    built = build(VECTORS_ND, {"kind": request.param}, clustered(300, 3))
    assert built.facts["recall"] >= 0.99
    return ItemIndex(built.index, VECTORS_ND, built.facts)


def assert_near_exact(index, found, wanted, least=0.97):
    hits = [np.isin(f, w).mean() for f, (w, _) in zip(found.indices_BK, wanted, strict=True)]
    assert np.mean(hits) >= (1.0 if index.kind == "flat" else least)
    for indices, scores in zip(found.indices_BK, found.scores_BK, strict=True):
        assert len(set(indices[indices > 0])) == (indices > 0).sum()
        assert (np.diff(scores) <= 0).all()


def test_plain_search(index):
    found = index.search(QUERIES_BD[:, None], 20)
    wanted = [exact(q[None], 20) for q in QUERIES_BD]
    assert found.indices_BK.shape == (64, 20)
    assert_near_exact(index, found, wanted)


def test_scores_are_true_inner_products(index):
    found = index.search(QUERIES_BD[:, None], 10)
    true = np.einsum("bkd,bd->bk", VECTORS_ND[found.indices_BK - 1], QUERIES_BD)
    np.testing.assert_allclose(found.scores_BK, true, atol=1e-5)


def test_batch_equals_single(index):
    batch = index.search(QUERIES_BD[:, None], 10)
    for row, query in enumerate(QUERIES_BD):
        single = index.search(query[None, None], 10)
        assert (single.indices_BK[0] == batch.indices_BK[row]).all()


def test_interests_merge_by_maximum(index):
    queries_BHD = QUERIES_BD.reshape(16, 4, D)
    found = index.search(queries_BHD, 30)
    wanted = [exact(q, 30) for q in queries_BHD]
    assert_near_exact(index, found, wanted)
    if index.kind == "flat":
        np.testing.assert_array_equal(found.indices_BK, [ids for ids, _ in wanted])


@pytest.mark.parametrize("count", [1, 50, 800])
def test_interests_leave_k_distinct_items_beside_the_excluded(index, count):
    queries_BHD = QUERIES_BD[:48].reshape(16, 3, D)
    excluded = [exact(q, count)[0] for q in queries_BHD]
    found = index.search(queries_BHD, 20, excluded=excluded)
    wanted = [exact(q, 20, e) for q, e in zip(queries_BHD, excluded, strict=True)]
    assert (found.indices_BK > 0).all()
    assert not any(np.isin(f, e).any() for f, e in zip(found.indices_BK, excluded, strict=True))
    assert_near_exact(index, found, wanted, least=0.9)


@pytest.mark.parametrize("count", [1, 50, 800])
def test_excluded_are_never_answered_and_k_remain(index, count):
    excluded = [exact(q[None], count)[0] for q in QUERIES_BD]
    found = index.search(QUERIES_BD[:, None], 20, excluded=excluded)
    wanted = [exact(q[None], 20, e) for q, e in zip(QUERIES_BD, excluded, strict=True)]
    assert (found.indices_BK > 0).all()
    assert not any(np.isin(f, e).any() for f, e in zip(found.indices_BK, excluded, strict=True))
    assert_near_exact(index, found, wanted, least=0.9)


@pytest.mark.parametrize("share", [0.002, 0.1, 0.9])
def test_allowed_is_searched_exactly(index, share):
    """Even where the allowed items lie far from the query: the nearest ones are not allowed."""
    scores = VECTORS_ND @ QUERIES_BD[0]
    allowed = np.argsort(scores)[: int(N * share)] + 1
    found = index.search(QUERIES_BD[:, None], 20, allowed=allowed)
    for row, query in enumerate(QUERIES_BD):
        ids, values = exact(query[None], 20, allowed=allowed)
        np.testing.assert_array_equal(found.indices_BK[row, : len(ids)], ids)
        np.testing.assert_allclose(found.scores_BK[row, : len(ids)], values, atol=1e-5)


def test_excluded_and_allowed_together(index):
    allowed = np.arange(1, N + 1, 7)
    excluded = [exact(q[None], 5, allowed=allowed)[0] for q in QUERIES_BD]
    found = index.search(QUERIES_BD[:, None], 5, excluded=excluded, allowed=allowed)
    for row, query in enumerate(QUERIES_BD):
        assert (found.indices_BK[row] == exact(query[None], 5, excluded[row], allowed)[0]).all()


@pytest.mark.parametrize("interests", [1, 3])
def test_a_batch_of_unlike_requests_equals_one_at_a_time(index, interests):
    """What one request passes over changes nothing for another."""
    queries_BHD = QUERIES_BD[:48].reshape(-1, interests, D)
    outs = [np.sort(exact(q, 37 * row)[0]) for row, q in enumerate(queries_BHD[:12])]
    together = index.nearest(queries_BHD[:12], 20, outs)
    for row, (hits, out) in enumerate(zip(together, outs, strict=True)):
        alone = index.nearest(queries_BHD[row][None], 20, [out])[0][0]
        np.testing.assert_array_equal(alone, hits[0])
        assert len(hits[0]) == 20


@pytest.mark.parametrize("interests", [1, 3])
@pytest.mark.parametrize("least", [0, 1500])
def test_denied_items_are_passed_over_like_excluded_ones(index, interests, least):
    """Also where it is the nearest ones that are denied: the search goes on until k remain."""
    queries_BHD = QUERIES_BD[:48].reshape(-1, interests, D)
    denied = exact(queries_BHD[0], 300)[0] if least == 0 else exact(queries_BHD[0], least)[0]
    left = np.setdiff1d(np.arange(1, N + 1), denied)
    subset = index.subset(left, exact=False)
    out = exact(queries_BHD[0], 9, allowed=left)[0]
    found = index.nearest(queries_BHD, 20, [np.sort(out)] * len(queries_BHD), subset)
    wanted = [exact(q, 20, out, allowed=left)[0] for q in queries_BHD]
    hits = [np.isin(f, w).mean() for (f, _), w in zip(found, wanted, strict=True)]
    assert all(len(f) == len(np.unique(f)) == 20 and not np.isin(f, denied).any() for f, _ in found)
    assert np.mean(hits) >= (1.0 if index.kind == "flat" else 0.95)
    assert hits[0] == 1.0


def test_a_subset_is_copied_where_it_is_narrow(index):
    narrow, broad = index.subset(np.arange(1, 1501)), index.subset(np.arange(1, 1502))
    assert isinstance(narrow, Gathered)
    assert isinstance(broad, Masked)
    assert (narrow.nbytes, broad.nbytes) == (1500 * (8 + 4 * D), N + 1)
    asked = np.array([1, 1500, 1501, 1502, N])
    assert narrow.holds(asked).tolist() == [True, True, False, False, False]
    assert broad.holds(asked).tolist() == [True, True, True, False, False]
    assert not index.subset(np.zeros(0, int)).holds(asked).any()


NEW_MD = clustered(40, 9)
GONE = np.arange(1, N + 1, 3)
NOBODY = np.zeros(0, int)


@pytest.fixture(scope="module")
def changed(index):
    """The index with new items beside it, a third of its own removed."""
    mask = np.zeros(N + 1, bool)
    mask[GONE] = True
    return DeltaIndex(index, NEW_MD, Gone(mask, len(GONE)))


def exact_now(queries_HD, k, out=(), among=None):
    """Score all that is there now, the slow and certain way."""
    scores = (np.concatenate([VECTORS_ND, NEW_MD]) @ queries_HD.T).max(axis=1)
    left = np.setdiff1d(np.arange(1, len(scores) + 1), [*GONE, *out])
    left = left if among is None else np.intersect1d(left, among)
    return left[np.lexsort((left, -scores[left - 1]))][:k]


@pytest.mark.parametrize("interests", [1, 3])
def test_new_items_are_found_and_removed_ones_are_not(changed, interests):
    queries_BHD = np.concatenate([NEW_MD[:8], QUERIES_BD[:40]]).reshape(-1, interests, D)
    outs = [np.sort(exact_now(q, 3)) for q in queries_BHD]
    found = changed.nearest(queries_BHD, 20, outs)
    wanted = [exact_now(q, 20, out) for q, out in zip(queries_BHD, outs, strict=True)]
    hits = [np.isin(f, w).mean() for (f, _), w in zip(found, wanted, strict=True)]
    assert np.mean(hits) >= (1.0 if changed.kind == "flat" else 0.97)
    new = [{i for i in w.tolist() if i > N} for w in wanted]
    assert any(new)
    for (items, scores), added, query in zip(found, new, queries_BHD, strict=True):
        # Those beside the index are all looked at.
        assert {i for i in items.tolist() if i > N} == added
        assert not np.isin(items, GONE).any()
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores, changed.score(query, items), atol=1e-5)


def test_a_subset_of_old_and_new_items(changed):
    own, extra = np.arange(5, N + 1, 7), np.arange(len(NEW_MD)) % 2 == 0
    within = Within(changed.base.subset(own), extra, N)
    among = np.append(own, N + 1 + np.flatnonzero(extra))
    for query in QUERIES_BD[:8]:
        found = changed.nearest(query[None, None], 15, [NOBODY], within)[0][0]
        np.testing.assert_array_equal(found, exact_now(query[None], 15, among=among))
    asked = np.array([5, 6, N, N + 1, N + 2])
    assert within.holds(asked).tolist() == np.isin(asked, among).tolist()


def test_all_that_is_there_now(changed):
    found = changed.nearest(QUERIES_BD[:1, None], 10**6, [NOBODY])[0][0]
    assert sorted(found) == np.setdiff1d(np.arange(1, N + 41), GONE).tolist()
    scores = changed.score_all(QUERIES_BD[:1])
    assert np.isneginf(scores[[0, *GONE]]).all()
    np.testing.assert_allclose(scores[N + 1 :], NEW_MD @ QUERIES_BD[0], atol=1e-5)
    np.testing.assert_array_equal(
        changed.vectors_ND[np.array([3, N + 5, 0])], [VECTORS_ND[3], NEW_MD[5], VECTORS_ND[0]]
    )


def test_of_equal_items_the_most_popular_comes_first():
    vectors_ND = np.repeat(clustered(5, 1), 4, axis=0)
    index = ItemIndex(build(vectors_ND, {"kind": "flat"}).index, vectors_ND, {"kind": "flat"})
    scores = np.round(vectors_ND @ vectors_ND[0], 4)
    expected = np.lexsort((np.arange(20), -scores)) + 1
    found = index.nearest(vectors_ND[:1, None], 7, [np.array([2])])[0][0]
    assert found.tolist() == [i for i in expected.tolist() if i != 2][:7]


def test_scores_of_some_items_and_of_all(index):
    queries_HD = QUERIES_BD[:3]
    true = (VECTORS_ND @ queries_HD.T).max(axis=1)
    some = np.array([9, 1, N, 77])
    np.testing.assert_allclose(index.score(queries_HD, some), true[some - 1], atol=1e-5)
    np.testing.assert_allclose(index.score_all(queries_HD)[1:], true, atol=1e-5)
    assert index.score(queries_HD, np.zeros(0, int)).shape == (0,)


def test_fewer_than_k_exist(index):
    allowed = np.array([5, 9, 11])
    found = index.search(QUERIES_BD[:1, None], 6, excluded=[np.array([9])], allowed=allowed)
    assert sorted(found.indices_BK[0].tolist()) == [0, 0, 0, 0, 5, 11]
    assert (found.indices_BK[0, 2:] == 0).all()
    assert np.isneginf(found.scores_BK[0, 2:]).all()


def test_nothing_allowed(index):
    found = index.search(QUERIES_BD[:2, None], 3, allowed=np.zeros(0, np.int64))
    assert (found.indices_BK == 0).all()
    assert np.isneginf(found.scores_BK).all()


def test_everything_excluded(index):
    found = index.search(QUERIES_BD[:1, None], 3, excluded=[np.arange(1, N + 1)])
    assert (found.indices_BK == 0).all()


def test_k_beyond_the_catalogue(index):
    found = index.search(QUERIES_BD[:1, None], 10**9)
    assert sorted(found.indices_BK[0].tolist()) == list(range(1, N + 1))
    found = index.search(QUERIES_BD[:1, None], 10**9, excluded=[np.array([3, 4])])
    assert sorted(found.indices_BK[0, :-2].tolist()) == [1, 2, *range(5, N + 1)]
    assert (found.indices_BK[0, -2:] == 0).all()


def test_no_requests(index):
    assert index.search(np.zeros((0, 1, D), np.float32), 4).indices_BK.shape == (0, 4)


def test_saved_equals_built(index, tmp_path: Path):
    faiss.write_index(index.index, str(tmp_path / "index.faiss"))
    name = "ef_search" if index.kind == "hnsw" else "nprobe"
    facts = {"kind": index.kind, name: index.effort, "refine": index.refine}
    again = ItemIndex.load(tmp_path / "index.faiss", VECTORS_ND, facts)
    kept, read = (i.search(QUERIES_BD[:, None], 10).indices_BK for i in (index, again))
    np.testing.assert_array_equal(kept, read)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 30])
def test_tiny_catalogues(kind, count):
    vectors_ND = clustered(count, 5)
    built = build(vectors_ND, {"kind": kind})
    found = ItemIndex(built.index, vectors_ND, built.facts).search(QUERIES_BD[:3, None], 50)
    assert [sorted(row) for row in found.indices_BK.tolist()] == [list(range(1, count + 1))] * 3


@pytest.mark.parametrize("kind", KINDS[1:])
def test_curve_ends_at_the_target(kind):
    facts = build(VECTORS_ND, {"kind": kind, "target_recall": 0.95}, QUERIES_BD).facts
    name = "ef_search" if kind == "hnsw" else "nprobe"
    efforts = [point[name] for point in facts["curve"]]
    assert efforts == sorted(set(efforts))
    assert facts[name] == efforts[-1]
    assert facts["curve"][-1]["recall@100"] == facts["recall"] >= 0.95
    assert all(point["recall@100"] < 0.95 for point in facts["curve"][:-1])
    assert all(point["p50_ms"] > 0 for point in facts["curve"])


def test_building_twice_is_the_same():
    one, two = (build(VECTORS_ND, {"kind": "ivf_flat"}, QUERIES_BD) for _ in range(2))
    assert (faiss.serialize_index(one.index) == faiss.serialize_index(two.index)).all()
    assert one.facts["nprobe"] == two.facts["nprobe"]


def test_auto_is_exact_up_to_its_limit():
    assert build(VECTORS_ND, {"exact_up_to": N}).facts["kind"] == "flat"
    assert build(VECTORS_ND, {"exact_up_to": N - 1}, QUERIES_BD).facts["kind"] == "ivf_flat"


def test_auto_takes_codes_where_whole_vectors_would_be_too_large():
    settings = IndexSettings(exact_up_to=10, whole_up_to_mib=1)
    assert settings.resolve(1 << 14, dim=16) == "ivf_flat"
    assert settings.resolve((1 << 14) + 1, dim=16) == "ivf_pq"


@pytest.mark.parametrize("kind", KINDS)
def test_shards_find_what_the_whole_index_finds(kind, tmp_path: Path):
    settings = {"kind": kind, **({"code_bytes": 4} if kind == "ivf_pq" else {})}
    whole = build(VECTORS_ND, settings, QUERIES_BD)
    parts = build(VECTORS_ND, {**settings, "shards": 3}, QUERIES_BD)
    facts = parts.write(tmp_path)
    files = [tmp_path / name for name in names(facts["shards"])]
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    read = ItemIndex.load(files, VECTORS_ND, facts)
    one, several = (
        index.search(QUERIES_BD[:32, None], 20)
        for index in (ItemIndex(whole.index, VECTORS_ND, facts), read)
    )
    if kind == "hnsw":  # a graph a shard is another graph
        assert_near_exact(read, several, [exact(q[None], 20) for q in QUERIES_BD[:32]])
    else:
        np.testing.assert_array_equal(one.indices_BK, several.indices_BK)
        np.testing.assert_array_equal(one.scores_BK, several.scores_BK)


def test_built_from_a_map_in_parts_it_is_the_same(tmp_path: Path, monkeypatch):
    """Vectors are added some at a time, and exact search reads them so, too."""
    np.save(tmp_path / "vectors.npy", VECTORS_ND)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    settings = {"kind": "ivf_pq", "code_bytes": 4}
    whole = build(VECTORS_ND, settings, QUERIES_BD)
    monkeypatch.setattr(kinds, "CHUNK_BYTES", 4 * D * 700)
    parts = build(mapped, settings, QUERIES_BD)
    assert (faiss.serialize_index(whole.index) == faiss.serialize_index(parts.index)).all()
    assert whole.facts["recall"] == parts.facts["recall"]
    top = exact_top(mapped, QUERIES_BD, 10)
    np.testing.assert_array_equal(top + 1, [exact(q[None], 10)[0] for q in QUERIES_BD])


def test_codes_say_how_many_are_scored_exactly():
    facts = build(VECTORS_ND, {"kind": "ivf_pq", "code_bytes": 2}, QUERIES_BD).facts
    assert facts["code_bytes"] == 2
    assert facts["refine"] > 2
    assert facts["recall"] >= 0.99
    assert facts["build_peak_mib"] >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_vectors_name_the_row(value):
    vectors_ND = VECTORS_ND.copy()
    vectors_ND[17, 3] = value
    with pytest.raises(InputError, match=r"1 of 3000 rows hold NaN or infinite.*row 17"):
        build(vectors_ND)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ivfflat"}, "did you mean 'ivf_flat'"),
        ({"kindd": "flat"}, "unknown setting index.kindd.*did you mean 'kind'"),
        ({"kind": "flat", "nlist": 4}, "index.nlist=4 has no effect with index.kind=flat"),
        ({"kind": "hnsw", "exact_up_to": 5}, "no effect with index.kind=hnsw"),
        ({"kind": "ivf_flat", "target_recall": 1.5}, "at most 1"),
        ({"kind": "ivf_flat", "nlist": 0}, "must be above 0"),
        ({"kind": "ivf_flat", "nlist": 4000}, "more than the 3000 items"),
        (
            {"kind": "ivf_pq", "code_bytes": 5},
            "5 does not divide the 16 dim.*one of 1, 2, 4,",
        ),
        (
            {"kind": "ivf_sq8", "code_bytes": 4},
            "has no effect with index.kind=ivf_sq8",
        ),
        ({"kind": "flat", "shards": 3001}, "index.shards=3001 is more than the 3000 items"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        build(VECTORS_ND, settings)


def test_another_catalogue_is_refused(tmp_path: Path):
    built = build(VECTORS_ND)
    with pytest.raises(InputError, match="holds 3000 × 16 vectors, expected 10 × 16"):
        ItemIndex(built.index, VECTORS_ND[:10], built.facts)
    (tmp_path / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a FAISS index"):
        ItemIndex.load(tmp_path / "index.faiss", VECTORS_ND, IndexSettings().__dict__)
