"""A folder into a store: every file is a row, in order, however it is batched."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from embedding_runs import assert_rows_are_their_files, assert_same_store, counts, names, opened_by, refusal

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import sources
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.store import Store
from mgn_deploy.images import memory


def test_rows_are_in_the_order_of_names_and_are_their_files(crops, tmp_path, embedder):
    report = embed_folder(crops, tmp_path / "s", embedder, labels="market1501")
    assert counts(report) == (40, 0, 0, 0)
    assert names(tmp_path / "s") == sorted(names(tmp_path / "s"), key=os.fsencode)
    assert_rows_are_their_files(tmp_path / "s", crops, embedder)
    assert Store.open(tmp_path / "s").identities().tolist() == np.tile(np.repeat(np.arange(1, 11), 2), 2).tolist()


def test_two_runs_give_the_same_bytes(crops, tmp_path, embedder):
    embed_folder(crops, tmp_path / "s", embedder)
    embed_folder(crops, tmp_path / "t", embedder)
    assert_same_store(tmp_path / "s", tmp_path / "t")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_does_not_move_rows(images, tmp_path, embedder, batch_size):
    (images / "c.jpg").write_bytes(b"")
    embed_folder(images, tmp_path / "s", embedder, batch_size=batch_size)
    assert names(tmp_path / "s") == ["a.jpg", "b.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert_rows_are_their_files(tmp_path / "s", images, embedder)


def test_every_engine_call_has_a_full_batch(images, tmp_path, embedder):
    """An engine may round otherwise at another batch size; a store must not depend on where a run was cut off."""

    class CountingBackend(OnnxRuntimeBackend):
        def __call__(self, images):
            sizes.append(len(images))
            return super().__call__(images)

    sizes: list[int] = []
    embed_folder(images, tmp_path / "s", opened_by(CountingBackend, embedder.bundle), batch_size=4)
    assert sizes == [4, 4]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(images, tmp_path, embedder, batch_size):
    expected = f"batch_size must be at least 1 and at most 4096, not {batch_size}"
    assert refusal(UserError, embed_folder, images, tmp_path / "s", embedder, batch_size=batch_size) == expected
    assert refusal(UserError, embedder.embed, [images / "a.jpg"], batch_size=batch_size) == expected


def test_float16_store_is_near_the_embeddings(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder, dtype="float16")
    assert Store.open(tmp_path / "s").embeddings().dtype == np.float16
    assert_rows_are_their_files(tmp_path / "s", images, embedder, tolerance=5e-4)


def test_no_more_files_are_in_memory_at_once_than_fit(images, monkeypatch):
    monkeypatch.setattr(memory, "LIMIT_BYTES", 1)
    read, begun, most = sources.file_bytes, [], []

    def slow(file):
        begun.append(file)
        most.append(len(begun))
        time.sleep(0.02)
        begun.pop()
        return read(file)

    monkeypatch.setattr(sources, "file_bytes", slow)
    source = replace(open_source(images), threads=4)
    assert len(list(source.decode(source.files, 96, 32))) == len(source.files) > 1
    assert set(most) == {1}


def test_progress_ends_at_the_number_of_files(images, tmp_path, embedder):
    (images / "c.jpg").write_bytes(b"")
    calls = []
    embed_folder(
        images,
        tmp_path / "s",
        embedder,
        batch_size=2,
        progress=lambda step, done, total: calls.append((done, total)),
    )
    assert calls[-1] == (6, 6)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
