"""Whatever cuts a run off, a kill, a full disk or an engine, the next one ends with the same store."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from embedding_runs import assert_rows_are_their_files, assert_same_store, counts, names, opened_by, refusal

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery import run as gallery_run
from mgn_deploy.gallery import writer
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store

SHARD = 8


def run_that_dies(folder: Path, store: Path, bundle: Path, moment: str, victim: int) -> None:
    """A run in shards of eight, for a process of its own, that dies by SIGKILL just before or after the n-th rename."""
    rename, renames = os.replace, count(1)

    def dying(source: str, target: str) -> None:
        is_victim = next(renames) == victim
        if moment == "after":
            rename(source, target)
        if is_victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            rename(source, target)

    writer.SHARD_ROWS = SHARD
    os.replace = dying
    embed_folder(folder, store, Embedder.open(bundle, "onnxruntime"))


# Cut off in the middle


@pytest.fixture(scope="module")
def mixed(crops, tmp_path_factory) -> Path:
    """The forty crops and four bad files between them."""
    folder = tmp_path_factory.mktemp("mixed") / "images"
    shutil.copytree(crops, folder)
    for place in ("camera 1/0001_c1s1_x.jpg", "camera 1/0005_c1s1_x.jpg", "camera 2/0003_c2s1_x.jpg", "zz.jpg"):
        (folder / place).touch()
    return folder


@pytest.fixture(scope="module")
def undisturbed(mixed, embedder, tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("undisturbed") / "s"
    run_in_small_shards(mixed, store, embedder)
    assert len(list(store.glob("*.parquet"))) == 6
    return store


def run_in_small_shards(folder: Path, store: Path, embedder: Embedder) -> gallery_run.GalleryReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", SHARD)
        return embed_folder(folder, store, embedder)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("rename", [1, 2, 3, 4, 5, 6, 7, 10, 15])
def test_run_after_kill_9_ends_with_the_undisturbed_store(
    mixed, undisturbed, bundle_folder, embedder, tmp_path, moment, rename
):
    """Renames: a manifest, then for each shard its .npy, its Parquet, a manifest."""
    store = tmp_path / "s"
    # Forked by a server that has imported what a run needs, which takes longer than the run.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["mgn_deploy.gallery.embed", "onnxruntime"])
    killed = forks.Process(target=run_that_dies, args=(mixed, store, bundle_folder, moment, rename))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    if (moment, rename) != ("before", 1):
        left = Store.open(store, verify=True)
        committed = (rename - (moment == "before") - 1) // 3
        assert len(left.rows) + len(left.failures) == committed * SHARD
    run_in_small_shards(mixed, store, embedder)
    assert_same_store(store, undisturbed)


def test_run_is_committed_by_time_and_ends_with_the_undisturbed_store(
    mixed, undisturbed, embedder, tmp_path, monkeypatch
):
    sizes = []
    add = writer.StoreWriter.add

    def counted(self, rows, embeddings):
        sizes.append(len(rows))
        add(self, rows, embeddings)

    monkeypatch.setattr(gallery_run, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(writer.StoreWriter, "add", counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", SHARD)
        embed_folder(mixed, tmp_path / "s", embedder, batch_size=2)
    assert len(sizes) > 20
    assert_same_store(tmp_path / "s", undisturbed, tolerance=1e-6)


@pytest.mark.parametrize("ahead", [False, True], ids=["one at a time", "ahead"])
def test_interrupt_commits_what_was_embedded(mixed, embedder, tmp_path, ahead):
    """Of the batches that a backend has taken ahead, only what came back."""

    def interrupt(step, done, total):
        if done > 20:
            os.kill(os.getpid(), signal.SIGINT)

    if ahead:
        embedder = opened_by(StreamingBackend, embedder.bundle)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(mixed, tmp_path / "s", embedder, progress=interrupt)
    committed = len(names(tmp_path / "s"))
    assert 10 < committed < 40
    assert_rows_are_their_files(tmp_path / "s", mixed, embedder)
    assert counts(embed_folder(mixed, tmp_path / "s", embedder))[:2] == (40 - committed, committed)


def test_engine_failure_commits_what_was_embedded(mixed, embedder, tmp_path):
    class FailingBackend(OnnxRuntimeBackend):
        calls = 0

        def __call__(self, images):
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("engine died")
            return super().__call__(images)

    with pytest.raises(RuntimeError, match="engine died"):
        embed_folder(mixed, tmp_path / "s", opened_by(FailingBackend, embedder.bundle))
    assert len(names(tmp_path / "s")) >= 16
    assert_rows_are_their_files(tmp_path / "s", mixed, embedder)


# A full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; the file size limit below needs none")
@pytest.mark.parametrize("kilobytes", [4, 8, 12, 20, 36])
def test_full_disk_is_a_sentence_and_with_room_the_same_run_goes_on(mixed, undisturbed, embedder, tmp_path, kilobytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this root may not mount")
    try:
        assert "the disk is full (No space left on device); free some space" in refusal(
            UserError, run_in_small_shards, mixed, disk / "s", embedder
        )
        if (disk / "s/manifest.json").exists():
            for row in Store.open(disk / "s").rows:
                assert (mixed / row.name).exists()
            assert not list((disk / "s").glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        run_in_small_shards(mixed, disk / "s", embedder)
        assert_same_store(disk / "s", undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("limit", [100, 1000, 4000])
def test_limit_on_file_sizes_is_a_sentence_and_without_it_the_same_run_goes_on(
    mixed, undisturbed, embedder, tmp_path, limit
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(UserError) as refused:
            run_in_small_shards(mixed, tmp_path / "s", embedder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full (File too large)" in str(refused.value)
    run_in_small_shards(mixed, tmp_path / "s", embedder)
    assert_same_store(tmp_path / "s", undisturbed)


# A backend that has batches on their way, as TensorRT's does


class StreamingBackend(OnnxRuntimeBackend):
    """ONNX Runtime in a thread, asking for up to two batches before it gives the first one's rows."""

    dies_after: int | None = None

    def stream(self, batches):
        busy, given = deque(), 0
        with ThreadPoolExecutor(1) as pool:
            for images in batches:
                busy.append(pool.submit(self, images.copy()))
                images[:] = 0  # the caller's array is its own again
                if len(busy) == 2:
                    if given == self.dies_after:
                        raise RuntimeError("engine died")
                    yield busy.popleft().result()
                    given += 1
            while busy:
                yield busy.popleft().result()


class DyingBackend(StreamingBackend):
    dies_after = 2


def test_batches_on_their_way_change_no_byte(mixed, embedder, tmp_path):
    embed_folder(mixed, tmp_path / "one", embedder)
    ahead = opened_by(StreamingBackend, embedder.bundle)
    embed_folder(mixed, tmp_path / "ahead", ahead)
    assert_same_store(tmp_path / "ahead", tmp_path / "one")
    paths = [mixed / name for name in names(tmp_path / "one")]
    assert np.array_equal(ahead.embed(paths, batch_size=3), embedder.embed(paths, batch_size=3))


def test_an_engine_that_dies_with_batches_on_their_way_loses_only_those(mixed, embedder, tmp_path):
    ahead = opened_by(DyingBackend, embedder.bundle)
    with pytest.raises(RuntimeError, match="engine died"):
        embed_folder(mixed, tmp_path / "s", ahead)
    assert len(names(tmp_path / "s")) >= 16
    assert_rows_are_their_files(tmp_path / "s", mixed, embedder)


def test_too_many_failures_wait_for_the_batches_on_their_way(images, embedder, tmp_path):
    for name in ("b.jpg", "d.jpg"):
        (images / name).write_bytes(b"")
    ahead = opened_by(StreamingBackend, embedder.bundle)
    with pytest.raises(GateFailed, match="more than 1 images"):
        embed_folder(images, tmp_path / "s", ahead, batch_size=1, max_failures=1)
    assert names(tmp_path / "s") == ["a.jpg", "c.jpg"]
    assert_rows_are_their_files(tmp_path / "s", images, embedder)
