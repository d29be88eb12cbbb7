"""Distances and exact neighbours against plain numpy, in tiles, and into a file on a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.distance import distance_matrix, distance_rows, top_k, write_distance_matrix

# BLAS may round a product of unit rows otherwise in other blocks: tiles agree to this, not bit by bit.
ROUNDING = 1e-6


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
def test_tiles_give_what_one_tile_gives(metric, tile_bytes):
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    whole = distance_matrix(query, gallery, metric)
    tiled = distance_matrix(query, gallery, metric, tile_bytes=tile_bytes)
    np.testing.assert_allclose(tiled, whole, atol=ROUNDING)


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


def test_progress_ends_at_all_distances_and_never_goes_back():
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
    for compare in (distance_matrix, lambda q, g: top_k(q, g, 1)):
        with pytest.raises(UserError, match=sentence):
            compare(query, gallery)


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


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_written_file_loads_as_the_matrix(tmp_path, metric, monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.distance.TILE_BYTES", 2000)
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    seen: list[int] = []
    write_distance_matrix(
        tmp_path / "d.npy", query, gallery, metric, progress=lambda step, done, total: seen.append(done)
    )
    loaded = np.load(tmp_path / "d.npy")
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, distance_matrix(query, gallery, metric), atol=ROUNDING)
    assert seen[-1] == 23 * 41
    assert os.listdir(tmp_path) == ["d.npy"]


def test_a_broken_run_leaves_the_earlier_file_and_no_partial_one(tmp_path, monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.distance.TILE_BYTES", 2000)
    (tmp_path / "d.npy").write_bytes(b"earlier")

    def interrupt(step: str, done: int, total: int) -> None:
        assert (tmp_path / "d.npy").read_bytes() == b"earlier"
        raise KeyboardInterrupt

    rows = unit_rows(40, 16, 0)
    with pytest.raises(KeyboardInterrupt):
        write_distance_matrix(tmp_path / "d.npy", rows, rows, "cosine", progress=interrupt)
    assert os.listdir(tmp_path) == ["d.npy"]
    assert (tmp_path / "d.npy").read_bytes() == b"earlier"


@pytest.mark.parametrize("place", ["no-such-folder/d.npy", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, place):
    rows = unit_rows(3, 4, 0)
    with pytest.raises(UserError):
        write_distance_matrix(
            tmp_path / place, rows, rows, "cosine", progress=lambda step, done, total: pytest.fail("worked")
        )
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_with_both_sizes_before_the_work(small_disk, monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.distance.TILE_BYTES", 20_000)
    monkeypatch.delattr(os, "posix_fallocate")
    rows = unit_rows(600, 4, 0)
    sizes = rf"{128 + 4 * 600 * 600} bytes are needed and \d+ are free"
    with pytest.raises(UserError, match=rf"d\.npy cannot be written .*: {sizes}"):
        write_distance_matrix(
            small_disk / "d.npy", rows, rows, "cosine", progress=lambda step, done, total: pytest.fail("worked")
        )
    assert os.listdir(small_disk) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this platform cannot reserve space")
def test_the_whole_file_is_reserved_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("mgn_deploy.retrieval.distance.TILE_BYTES", 20_000)
    reserved: list[int] = []

    def look(step: str, done: int, total: int) -> None:
        reserved.extend(file.stat().st_size for file in tmp_path.iterdir())

    rows = unit_rows(450, 4, 0)
    write_distance_matrix(tmp_path / "d.npy", rows, rows, "cosine", progress=look)
    assert len(reserved) > 3
    assert set(reserved) == {128 + 4 * 450 * 450}


def test_a_disk_that_fills_up_while_writing_is_told_and_leaves_nothing(small_disk, monkeypatch):
    # As on a file system that cannot reserve: somebody else takes the space after the check.
    monkeypatch.setattr("mgn_deploy.retrieval.distance.TILE_BYTES", 20_000)
    monkeypatch.delattr(os, "posix_fallocate")

    def fill_disk(step: str, done: int, total: int) -> None:
        if not (small_disk / "other").exists():
            with pytest.raises(OSError, match="No space left"):
                (small_disk / "other").write_bytes(bytes(1 << 20))

    rows = unit_rows(450, 4, 0)
    with pytest.raises(UserError, match=r"No space left on device\): 810128 bytes are needed and \d+ are free"):
        write_distance_matrix(small_disk / "d.npy", rows, rows, "cosine", progress=fill_disk)
    assert os.listdir(small_disk) == ["other"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_file_size_limit_is_told_and_leaves_nothing(tmp_path):
    program = f"""
import resource
import numpy as np
from pathlib import Path
from mgn_deploy.retrieval.distance import write_distance_matrix
from mgn_deploy.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))
rows = np.ones((400, 4), np.float32)
try:
    write_distance_matrix(Path({str(tmp_path)!r}) / "d.npy", rows, rows, "cosine")
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "640128 bytes are needed" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


@settings(max_examples=150, deadline=None)
@given(
    queries=st.integers(1, 7),
    images=st.integers(1, 40),
    dim=st.integers(1, 4),
    k=st.integers(1, 45),
    tile_bytes=st.sampled_from([1, 200, 1000, 4000, 1 << 20]),
    share_excluded=st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_is_the_head_of_a_stable_argsort(queries, images, dim, k, tile_bytes, share_excluded, seed):
    query, gallery = small_integers(queries, dim, seed), small_integers(images, dim, seed + 1)
    excluded = np.random.default_rng(seed).random((queries, images)) < (share_excluded or 0)
    similarities = np.where(excluded, -np.inf, query @ gallery.T)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(similarities, order, axis=1)

    indices, found = top_k(
        query,
        gallery,
        k,
        excluded=None if share_excluded is None else lambda rows: excluded[rows],
        tile_bytes=tile_bytes,
    )
    assert (indices.dtype, found.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(indices, np.where(expected == -np.inf, -1, order))


def test_of_equal_neighbours_at_the_last_place_the_lower_index_is_kept():
    gallery = np.array([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    indices, _ = top_k(np.array([[1, 0]], np.float32), gallery, 3)
    assert indices.tolist() == [[1, 3, 0]]


def test_a_query_that_runs_out_of_candidates_gets_minus_one_and_minus_infinity():
    rows = np.eye(3, dtype=np.float32)
    indices, similarities = top_k(rows, rows, 2, excluded=lambda rows: np.array([[0, 1, 1]] * 3, bool)[rows])
    assert indices.tolist() == [[0, -1]] * 3
    assert similarities.tolist() == [[1, -np.inf], [0, -np.inf], [0, -np.inf]]


def test_top_k_memory_stays_below_tile_bytes():
    query, gallery = unit_rows(300, 16, 7).astype(np.float16), unit_rows(20_000, 16, 8).astype(np.float16)
    result = 300 * 10 * 12
    assert peak_bytes(lambda: top_k(query, gallery, 10, tile_bytes=500_000)) < 500_000 + result


def test_no_neighbours_asked_for_is_refused():
    rows = unit_rows(3, 4, 0)
    with pytest.raises(UserError, match="k is 0"):
        top_k(rows, rows, 0)


def peak_bytes(work) -> int:
    work()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
