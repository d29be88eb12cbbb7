"""Exact neighbours by FAISS against a stable argsort: ties, exclusions and blocks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.nearest import top_k


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def small_integers(n: int, dim: int, seed: int) -> np.ndarray:
    """Products of these are exact in float32 whatever the order of the sums, and tie often."""
    return np.random.default_rng(seed).integers(-1, 2, (n, dim)).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    queries=st.integers(1, 7),
    images=st.integers(1, 40),
    dim=st.integers(1, 4),
    k=st.integers(1, 45),
    block_bytes=st.sampled_from([1, 50, 300, 1 << 20]),
    share_excluded=st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_is_the_head_of_a_stable_argsort(queries, images, dim, k, block_bytes, share_excluded, seed):
    query, gallery = small_integers(queries, dim, seed), small_integers(images, dim, seed + 1)
    excluded = np.random.default_rng(seed).random((queries, images)) < (share_excluded or 0)
    similarities = np.where(excluded, -np.inf, query @ gallery.T)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(similarities, order, axis=1)

    indices, found = top_k(
        query,
        gallery,
        k,
        excluded=None if share_excluded is None else lambda rows: np.nonzero(excluded[rows]),
        block_bytes=block_bytes,
    )
    assert (indices.dtype, found.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(indices, np.where(expected == -np.inf, -1, order))


def test_of_equal_neighbours_at_the_last_rank_the_lower_index_is_kept():
    gallery = np.array([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    indices, _ = top_k(np.array([[1, 0]], np.float32), gallery, 3)
    assert indices.tolist() == [[1, 3, 0]]


def test_a_query_that_runs_out_of_candidates_gets_minus_one_and_minus_infinity():
    rows = np.eye(3, dtype=np.float32)
    indices, similarities = top_k(
        rows, rows, 2, excluded=lambda rows: np.nonzero(np.array([[0, 1, 1]] * 3, bool)[rows])
    )
    assert indices.tolist() == [[0, -1]] * 3
    assert similarities.tolist() == [[1, -np.inf], [0, -np.inf], [0, -np.inf]]


def test_many_ties_and_exclusions_are_asked_for_again_until_they_are_sorted_out(monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.nearest.QUERY_ROWS", 3)
    gallery = np.repeat(np.eye(2, dtype=np.float32), 500, axis=0)
    query = np.repeat(np.eye(2, dtype=np.float32)[:1], 7, axis=0)
    left_out = np.arange(0, 300, 2)
    indices, similarities = top_k(
        query,
        gallery,
        4,
        excluded=lambda rows: (
            np.repeat(np.arange(rows.stop - rows.start), 150),
            np.tile(left_out, rows.stop - rows.start),
        ),
    )
    assert indices.tolist() == [[1, 3, 5, 7]] * 7
    assert (similarities == 1).all()


def test_a_mapped_gallery_is_read_block_by_block(tmp_path):
    gallery = unit_rows(40_000, 16, 8).astype(np.float16)
    np.save(tmp_path / "g.npy", gallery)
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    query = unit_rows(50, 16, 7)
    expected = top_k(query, gallery, 10)
    tracemalloc.start()
    try:
        found = top_k(query, mapped, 10, block_bytes=100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found[0], expected[0])
    assert peak < gallery.nbytes / 2


@pytest.mark.parametrize("k", [1, 30, 200, 900])
def test_of_thousands_of_equal_neighbours_the_first_are_kept(k):
    """FAISS keeps the k best in another way from 100 on, and promises nothing of those that tie."""
    order = np.random.default_rng(0).permutation(6000)
    levels = np.repeat(np.array([3, 2, 1], np.float32), 2000)[order, None]
    indices, similarities = top_k(np.ones((2, 1), np.float32), levels, k)
    assert indices.tolist() == [np.argsort(-levels[:, 0], kind="stable")[:k].tolist()] * 2
    assert (similarities == 3).all()


class Shards:
    """A gallery that comes in parts, as a store's does."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts, self.reads = parts, 0

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def blocks(self):
        start = 0
        for part in self.parts:
            self.reads += 1
            yield slice(start, start + len(part)), part
            start += len(part)


@pytest.mark.parametrize("block_bytes", [1, 400, 1 << 20])
def test_a_gallery_in_parts_is_read_once_and_gives_what_the_whole_gives(block_bytes):
    gallery, query = small_integers(90, 3, 0).astype(np.float16), small_integers(11, 3, 1)
    shards = Shards([gallery[:7], gallery[7:8], gallery[8:60], gallery[60:]])
    found = top_k(query, shards, 9, block_bytes=block_bytes)
    expected = top_k(query, gallery, 9)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert shards.reads == 4


def test_a_broken_row_of_a_later_part_is_named_by_its_number_in_the_gallery():
    broken = unit_rows(9, 4, 0)
    broken[5, 1] = np.nan
    with pytest.raises(UserError, match="gallery embedding 15 is not finite"):
        top_k(unit_rows(2, 4, 1), Shards([unit_rows(10, 4, 2), broken]), 3, block_bytes=1)
    with pytest.raises(UserError, match="holds no embedding"):
        top_k(unit_rows(2, 4, 1), Shards([]), 3)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(broken):
    rows = unit_rows(9, 4, 0)
    wrong = rows.copy()
    wrong[5, 1] = broken
    with pytest.raises(UserError, match="gallery embedding 5 is not finite"):
        top_k(rows, wrong, 2)


def test_embeddings_of_two_lengths_are_refused():
    with pytest.raises(UserError, match="4 dimensions and gallery embeddings 3"):
        top_k(unit_rows(2, 4, 0), unit_rows(2, 3, 0), 1)


def test_no_neighbours_asked_for_is_refused():
    rows = unit_rows(3, 4, 0)
    with pytest.raises(UserError, match="k is 0"):
        top_k(rows, rows, 0)
