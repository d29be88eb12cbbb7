"""Re-ranking against the published algorithm, written out densely and one image after the other."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.encodings import encode
from mgn_deploy.retrieval.neighbours import find_neighbours
from mgn_deploy.retrieval.rerank import rerank, rerank_rows, rerank_top_k

DEVICES = [Arrays.of("numpy", "cpu"), Arrays.of("torch", "cpu")]
devices = pytest.mark.parametrize("device", DEVICES, ids=["numpy", "torch"])


def by_the_paper(query, gallery, k1=20, k2=6, weight=0.3) -> np.ndarray:
    """Sections 3.2 to 3.4 of Zhong et al. 2017 with N x N matrices in float64 and Python sets.

    Squared Euclidean distances over each image's largest, |N(i, k)| = k + 1, and NumPy's rounding of k1 / 2, as the
    authors' program has it (github.com/zhunzhong07/person-re-ranking).
    """
    images = np.concatenate([query, gallery]).astype(np.float64)
    n = len(images)
    squared = ((images[:, None] - images[None]) ** 2).sum(axis=2)
    largest = squared.max(axis=1, keepdims=True)
    original = squared / np.where(largest > 0, largest, 1)
    ranking = np.argsort(squared, axis=1, kind="stable")

    def nearest(i: int, k: int) -> list[int]:
        return ranking[i, : k + 1].tolist()

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in nearest(i, k) if i in nearest(j, k)}

    encodings = np.zeros((n, n))
    for i in range(n):
        mine = reciprocal(i, k1)
        expanded = set(mine)
        for j in mine:
            theirs = reciprocal(j, int(np.around(k1 / 2)))
            if len(mine & theirs) > 2 / 3 * len(theirs):
                expanded |= theirs
        members = sorted(expanded)
        weights = np.exp(-original[i, members])
        encodings[i, members] = weights / weights.sum()
    if k2 != 1:
        encodings = np.stack([encodings[ranking[i, :k2]].mean(axis=0) for i in range(n)])
    jaccard = np.empty((len(query), n))
    for i in range(len(query)):
        common = np.minimum(encodings[i], encodings).sum(axis=1)
        jaccard[i] = 1 - common / (2 - common)
    return ((1 - weight) * jaccard + weight * original[: len(query)])[:, len(query) :]


def people(n: int, dim: int, seed: int, identities: int = 6) -> np.ndarray:
    """Unit rows around a few centres, so that neighbourhoods mean something."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((identities, dim))
    rows = centres[rng.integers(0, identities, n)] + 0.6 * rng.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def with_ties(n: int, dim: int, seed: int) -> np.ndarray:
    """Distances of these are exact in float32 and tie often; many rows are equal."""
    return np.random.default_rng(seed).integers(-1, 2, (n, dim)).astype(np.float32)


@devices
@pytest.mark.parametrize("seed", range(3))
def test_people_are_ranked_as_the_paper_ranks_them(device, seed):
    images = people(130, 24, seed)
    query, gallery = images[:40], images[40:]
    np.testing.assert_allclose(rerank(query, gallery, device=device), by_the_paper(query, gallery), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 12),
    images=st.integers(1, 40),
    dim=st.integers(1, 5),
    k1=st.integers(1, 30),
    k2=st.integers(1, 9),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ties_copies_and_small_galleries_are_ranked_as_the_paper_ranks_them(queries, images, dim, k1, k2, weight, seed):
    rows = with_ties(queries + images, dim, seed)
    query, gallery = rows[:queries], rows[queries:]
    found = rerank(query, gallery, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(found, by_the_paper(query, gallery, k1, k2, weight), atol=1e-5)


@pytest.mark.parametrize("k1", [1, 3, 5, 6, 7])
def test_half_of_an_odd_k1_is_rounded_as_numpy_rounds(k1):
    rows = people(60, 8, 0)
    np.testing.assert_allclose(rerank(rows[:20], rows[20:], k1=k1), by_the_paper(rows[:20], rows[20:], k1), atol=1e-5)


def test_float16_embeddings_are_ranked_as_their_float32_values():
    rows = people(90, 16, 1).astype(np.float16)
    expected = by_the_paper(rows[:30], rows[30:])
    np.testing.assert_allclose(rerank(rows[:30], rows[30:]), expected, atol=1e-5)


def test_blocks_and_tiles_change_nothing(monkeypatch):
    images = people(150, 16, 2)
    whole = rerank(images[:50], images[50:])
    monkeypatch.setattr("mgn_deploy.retrieval.encodings.BLOCK_VALUES", 3000)
    monkeypatch.setattr("mgn_deploy.retrieval.encodings.JACCARD_VALUES", 700)
    monkeypatch.setattr("mgn_deploy.retrieval.rerank.LEAST_QUERIES", 7)
    monkeypatch.setattr("mgn_deploy.retrieval.rerank.QUERY_VALUES", 1)
    np.testing.assert_allclose(rerank(images[:50], images[50:]), whole, atol=1e-6)


@devices
@pytest.mark.parametrize("side", [1, 7, 50, 500])
def test_neighbours_are_the_head_of_a_stable_argsort_in_tiles_of_any_size(device, side):
    images = with_ties(60, 4, 3) if device.is_numpy else people(60, 4, 3)
    squared = ((images[:, None].astype(np.float64) - images[None]) ** 2).sum(axis=2)
    found = find_neighbours(images, 9, arrays=device, side=side)
    order = np.argsort(squared, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.distances, np.take_along_axis(squared, order, axis=1), atol=1e-5)
    np.testing.assert_allclose(found.farthest, squared.max(axis=1), atol=1e-5)


def test_a_tie_with_an_image_of_a_later_tile_goes_to_the_lower_index():
    """Points 9, 19, ... come first, then 10 and 11, 20 and 21, ...: 9 and 11 are as near to 10."""
    tens = np.arange(10.0, 2010, 10, dtype=np.float32)
    points = np.concatenate([tens - 1, np.stack([tens, tens + 1], axis=1).ravel()])[:, None]
    found = find_neighbours(points, 2, arrays=Arrays.open("cpu"), side=200)
    np.testing.assert_array_equal(found.indices[200::2, 1], np.arange(200))


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_the_best_k_are_the_head_of_the_whole_ranking(k):
    images = people(120, 16, 4)
    query, gallery = images[:30], images[30:]
    whole = rerank(query, gallery)
    order = np.argsort(whole, axis=1, kind="stable")[:, :k]
    indices, distances = rerank_top_k(query, gallery, k)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(distances, np.take_along_axis(whole, order, axis=1))


def test_images_that_are_excluded_take_part_and_are_not_returned():
    images = people(60, 16, 5)
    query, gallery = images[:10], images[10:]
    mask = np.random.default_rng(0).random((10, 50)) < 0.9
    indices, distances = rerank_top_k(query, gallery, 20, excluded=lambda rows: mask[rows])
    whole = np.where(mask, np.inf, rerank(query, gallery))
    order = np.argsort(whole, axis=1, kind="stable")[:, :20]
    expected = np.take_along_axis(whole, order, axis=1)
    np.testing.assert_array_equal(distances, expected)
    np.testing.assert_array_equal(indices, np.where(np.isinf(expected), -1, order))


def test_every_image_is_nearest_to_itself_by_jaccard_distance():
    distances = encode(people(80, 16, 6)).jaccard(slice(None))
    assert distances.diagonal() == pytest.approx(0, abs=1e-5)
    assert distances == pytest.approx(distances.T, abs=1e-6)
    assert distances.max() <= 1


def test_memory_grows_with_the_images_and_not_with_their_square():
    images = people(6000, 8, 7, identities=300)
    tracemalloc.start()
    try:
        encode(images, k1=10, k2=3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Tiles of 4096 x 4096 and blocks apart, whose size is fixed.
    assert peak < 6000 * 6000 * 8


def test_progress_counts_tiles_and_queries():
    seen: list[tuple[str, int, int]] = []
    images = people(1300, 8, 8)
    for _ in rerank_rows(images[:1100], images[1100:], progress=lambda *step: seen.append(step)):
        pass
    assert seen == [("neighbours", 1, 1), ("re-ranking", 1024, 1100), ("re-ranking", 1100, 1100)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k1": 0}, "k1 is 0"),
        ({"k2": 0}, "k2 is 0"),
        ({"weight": 1.5}, "weight is 1.5"),
        ({"device": "abacus"}, "device 'abacus' is not known"),
    ],
)
def test_what_is_out_of_range_is_refused(options, sentence):
    rows = people(10, 4, 0)
    with pytest.raises(UserError, match=sentence):
        rerank(rows[:2], rows[2:], **options)


def test_embeddings_that_are_not_finite_or_of_two_lengths_are_refused():
    rows = people(10, 4, 0)
    broken = rows.copy()
    broken[3, 1] = np.nan
    with pytest.raises(UserError, match="gallery embedding 3 is not finite"):
        rerank(rows, broken)
    with pytest.raises(UserError, match="4 dimensions and gallery embeddings 3"):
        rerank(rows, rows[:, :3])
