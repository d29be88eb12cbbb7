"""Distances into a file: whole or not at all, also where the disk is small or fills up."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distances import ROUNDING, unit_rows

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.distance import distance_matrix, write_distance_matrix


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_written_file_loads_as_the_matrix(tmp_path, metric):
    query, gallery = unit_rows(23, 16, 1), unit_rows(41, 16, 2)
    seen: list[int] = []
    write_distance_matrix(
        tmp_path / "d.npy",
        query,
        gallery,
        metric,
        tile_bytes=2000,
        progress=lambda step, done, total: seen.append(done),
    )
    loaded = np.load(tmp_path / "d.npy")
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, distance_matrix(query, gallery, metric), atol=ROUNDING)
    assert seen[-1] == 23 * 41
    assert os.listdir(tmp_path) == ["d.npy"]


def test_a_broken_run_leaves_the_earlier_file_and_no_partial_one(tmp_path):
    (tmp_path / "d.npy").write_bytes(b"earlier")

    def interrupt(step: str, done: int, total: int) -> None:
        assert (tmp_path / "d.npy").read_bytes() == b"earlier"
        raise KeyboardInterrupt

    rows = unit_rows(40, 16, 0)
    with pytest.raises(KeyboardInterrupt):
        write_distance_matrix(tmp_path / "d.npy", rows, rows, "cosine", tile_bytes=2000, progress=interrupt)
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
    reserved: list[int] = []

    def look(step: str, done: int, total: int) -> None:
        reserved.extend(file.stat().st_size for file in tmp_path.iterdir())

    rows = unit_rows(450, 4, 0)
    write_distance_matrix(tmp_path / "d.npy", rows, rows, "cosine", tile_bytes=20_000, progress=look)
    assert len(reserved) > 3
    assert set(reserved) == {128 + 4 * 450 * 450}


def test_a_disk_that_fills_up_while_writing_is_told_and_leaves_nothing(small_disk, monkeypatch):
    # As on a file system that cannot reserve: somebody else takes the space after the check.
    monkeypatch.delattr(os, "posix_fallocate")

    def fill_disk(step: str, done: int, total: int) -> None:
        if not (small_disk / "other").exists():
            with pytest.raises(OSError, match="No space left"):
                (small_disk / "other").write_bytes(bytes(1 << 20))

    rows = unit_rows(450, 4, 0)
    with pytest.raises(UserError, match=r"No space left on device\): 810128 bytes are needed and \d+ are free"):
        write_distance_matrix(small_disk / "d.npy", rows, rows, "cosine", tile_bytes=20_000, progress=fill_disk)
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
