"""Distances against plain numpy, and in tiles."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from distances import ROUNDING, unit_rows

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.retrieval import distance
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.distance import distance_matrix, distance_rows, measured_error


def small_integers(n: int, dim: int, seed: int) -> np.ndarray:
    """Products of these are exact in float32 whatever the order of the sums, and tie often."""
    return np.random.default_rng(seed).integers(-1, 2, (n, dim)).astype(np.float32)


def test_cosine_of_equal_orthogonal_and_opposite_rows_is_0_1_2():
    query = np.array([[1, 0]], np.float32)
    gallery = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    assert distance_matrix(query, gallery).tolist() == [[0, 1, 2]]


def test_euclidean_is_the_length_of_the_difference_even_off_the_unit_sphere():
    query = np.array([[0, 3], [1, 1]], np.float32)
    gallery = np.array([[4, 0], [1, 1]], np.float32)
    expected = np.sqrt(np.array([[25, 5], [10, 0]], np.float32))
    np.testing.assert_array_equal(distance_matrix(query, gallery, "euclidean"), expected)


def test_euclidean_of_equal_rows_is_never_nan():
    rows = unit_rows(200, 37, 0)
    distances = distance_matrix(rows, rows, "euclidean")
    assert np.isfinite(distances).all()
    assert distances.diagonal().max() < 1e-3


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("tile_bytes", [1, 700, 5000])
def test_tiles_give_what_one_tile_gives(metric, tile_bytes, monkeypatch):
    monkeypatch.setattr(distance, "DIRECT_TILE_BYTES", 0)
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    whole = distance_matrix(query, gallery, metric)
    tiled = distance_matrix(query, gallery, metric, tile_bytes=tile_bytes)
    np.testing.assert_allclose(tiled, whole, atol=ROUNDING)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("tile_bytes", [700, 1 << 20])
def test_pytorch_gives_what_numpy_gives(metric, tile_bytes):
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    by_torch = distance_matrix(query, gallery, metric, tile_bytes=tile_bytes, device=Arrays.of("torch", "cpu"))
    np.testing.assert_allclose(by_torch, distance_matrix(query, gallery, metric), atol=ROUNDING)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_cosine_never_leaves_0_to_2_though_float16_rows_are_no_unit_rows(library):
    rows = unit_rows(300, 37, 0).astype(np.float16)
    assert (1 - (rows.astype(np.float32) ** 2).sum(axis=1)).min() < 0
    distances = distance_matrix(rows, np.concatenate([rows, -rows]), device=Arrays.of(library, "cpu"))
    assert distances.min() == 0
    assert distances.max() == 2


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_measured_error_is_that_of_the_precision(library, metric):
    query, gallery = unit_rows(300, 64, 0), unit_rows(2500, 64, 1)
    error = {
        compute: measured_error(query, gallery, metric, device=Arrays.of(library, "cpu", compute))
        for compute in ("float32", "float16")
    }
    assert error["float32"] < 2e-6
    assert 1e-5 < error["float16"] < 2e-3


def test_a_device_or_precision_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.arrays._cuda", lambda: None)
    rows = unit_rows(3, 4, 0)
    with pytest.raises(CannotRun, match="neither PyTorch nor CuPy finds a CUDA device here; use --device cpu"):
        distance_matrix(rows, rows, device="cuda")
    with pytest.raises(CannotRun, match="tf32 is computed by PyTorch on CUDA devices, and this is numpy on cpu"):
        Arrays.open("auto", "tf32")
    with pytest.raises(UserError, match="products in 'int4' are not known: choose one of float32, tf32, float16"):
        Arrays.open("cpu", "int4")


def test_tiles_of_exact_products_give_the_same_bits():
    query, gallery = small_integers(23, 16, 1), small_integers(41, 16, 2)
    whole = distance_matrix(query, gallery, "euclidean")
    assert np.array_equal(distance_matrix(query, gallery, "euclidean", tile_bytes=900), whole)


def test_float16_memmaps_give_the_distances_of_their_float32_values(tmp_path):
    gallery = unit_rows(30, 16, 3).astype(np.float16)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    query = unit_rows(7, 16, 4)
    distances = distance_matrix(query, mapped, tile_bytes=2000)
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, 1 - query @ gallery.astype(np.float32).T, atol=ROUNDING)


def test_distances_go_into_the_rows_of_out_and_nowhere_else():
    query, gallery = unit_rows(5, 8, 5), unit_rows(9, 8, 6)
    wide = np.full((5, 20), 7, np.float32)
    distance_matrix(query, gallery, out=wide[:, 4:13])
    np.testing.assert_allclose(wide[:, 4:13], distance_matrix(query, gallery), atol=ROUNDING)
    assert (wide[:, :4] == 7).all()
    assert (wide[:, 13:] == 7).all()


def test_memory_beyond_out_stays_below_tile_bytes():
    query, gallery = unit_rows(600, 64, 7).astype(np.float16), unit_rows(5000, 64, 8).astype(np.float16)
    out = np.empty((600, 5000), np.float32)
    assert peak_bytes(lambda: distance_matrix(query, gallery, out=out, tile_bytes=300_000)) < 300_000


def test_products_of_float32_rows_go_straight_into_out():
    query, gallery = unit_rows(600, 64, 7), unit_rows(5000, 64, 8)
    out = np.empty((600, 5000), np.float32)
    assert peak_bytes(lambda: distance_matrix(query, gallery, out=out)) < 100_000


def test_progress_ends_at_all_distances_and_never_goes_back(monkeypatch):
    monkeypatch.setattr(distance, "DIRECT_TILE_BYTES", 0)
    seen: list[tuple[int, int]] = []
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    distance_matrix(query, gallery, tile_bytes=2000, progress=lambda step, done, total: seen.append((done, total)))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (23 * 41, 23 * 41)


def test_rows_a_few_at_a_time_make_up_the_matrix():
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    tiles = [(rows, tile.copy()) for rows, tile in distance_rows(query, gallery, tile_bytes=2000)]
    assert [rows.start for rows, _ in tiles] == [0, 6, 12, 18]
    together = np.concatenate([tile for _, tile in tiles])
    np.testing.assert_allclose(together, distance_matrix(query, gallery), atol=ROUNDING)


@pytest.mark.parametrize(
    ("query", "gallery", "sentence"),
    [
        (np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), "3 dimensions .* 4: both have to come"),
        (np.ones((0, 3), np.float32), np.ones((2, 3), np.float32), "query embeddings are empty"),
        (np.ones((2, 3), np.float32), np.ones((0, 3), np.float32), "gallery embeddings are empty"),
        (np.ones((2, 0), np.float32), np.ones((2, 0), np.float32), "query embeddings are empty"),
        (np.ones((2, 3), np.int64), np.ones((2, 3), np.float32), "query embeddings are int64"),
        (np.ones(3, np.float32), np.ones((2, 3), np.float32), r"query embeddings are float32 \[3\]"),
    ],
)
def test_embeddings_that_cannot_be_compared_are_refused_in_a_sentence(query, gallery, sentence):
    with pytest.raises(UserError, match=sentence):
        distance_matrix(query, gallery)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_embedding_that_is_not_finite_is_named(value):
    gallery = unit_rows(50, 4, 0)
    gallery[[31, 40], 2] = value
    with pytest.raises(UserError, match="gallery embedding 31 is not finite"):
        distance_matrix(unit_rows(2, 4, 1), gallery, tile_bytes=100)


def test_an_unknown_metric_and_a_wrong_out_are_refused():
    rows = unit_rows(3, 4, 0)
    with pytest.raises(UserError, match="'manhattan' is not known: choose one of cosine, euclidean"):
        distance_matrix(rows, rows, "manhattan")
    with pytest.raises(UserError, match=r"out is float64 \[3, 3\]"):
        distance_matrix(rows, rows, out=np.empty((3, 3)))


def peak_bytes(work) -> int:
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
