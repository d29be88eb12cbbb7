"""A folder embedded again: what changed is embedded anew, and nothing else."""

from __future__ import annotations

import os
import shutil

import numpy as np
from embedding_runs import assert_rows_are_their_files, counts, failures, names, refusal

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.store import Store


def test_second_run_changes_nothing(images, tmp_path, embedder):
    (images / "b.jpg").write_bytes(b"")
    embed_folder(images, tmp_path / "s", embedder)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (0, 5, 1, 0)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


def test_changed_file_is_embedded_again_and_its_new_row_counts(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    draw_crop(50, 2, 0).save(images / "c.jpg", quality=90)
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (1, 5, 0, 0)
    assert names(tmp_path / "s") == ["a.jpg", "b.jpg", "d.jpg", "e.jpg", "f.jpg", "c.jpg"]
    assert_rows_are_their_files(tmp_path / "s", images, embedder)


def test_file_of_the_same_size_and_another_mtime_is_embedded_again(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    os.utime(images / "c.jpg", ns=(0, (images / "c.jpg").stat().st_mtime_ns + 1))
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (1, 5, 0, 0)


def test_new_and_removed_files(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    (images / "a.jpg").rename(images / "z.jpg")
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (1, 5, 0, 1)
    assert names(tmp_path / "s") == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg", "z.jpg"]


def test_file_that_became_unreadable_is_a_failure_and_mended_an_image(images, tmp_path, embedder):
    whole = (images / "c.jpg").read_bytes()
    embed_folder(images, tmp_path / "s", embedder)
    (images / "c.jpg").write_bytes(whole[:900])
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (0, 5, 1, 0)
    assert "c.jpg" not in names(tmp_path / "s")
    (images / "c.jpg").write_bytes(whole)
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (1, 5, 0, 0)
    assert failures(tmp_path / "s") == {}
    assert_rows_are_their_files(tmp_path / "s", images, embedder)


def test_store_of_another_folder_is_refused(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    shutil.copytree(images, tmp_path / "copy")
    assert "was made with source" in refusal(UserError, embed_folder, tmp_path / "copy", tmp_path / "s", embedder)


def test_store_goes_on_with_a_source_that_was_renamed(images, tmp_path, embedder, said):
    embed_folder(images, tmp_path / "s", embedder)
    images.rename(tmp_path / "moved")
    draw_crop(50, 2, 0).save(tmp_path / "moved/g.jpg", quality=90)
    assert counts(embed_folder(tmp_path / "moved", tmp_path / "s", embedder)) == (1, 6, 0, 0)
    assert f"it goes on with {(tmp_path / 'moved').as_uri()}" in " ".join(said)
    store = Store.open(tmp_path / "s")
    assert store.path(store.rows[0]) == tmp_path / "moved/a.jpg"


def test_source_that_is_gone_is_not_replaced_by_another(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    (tmp_path / "other").mkdir()
    shutil.move(images / "a.jpg", tmp_path / "other/x.jpg")
    shutil.rmtree(images)
    assert "was made with source" in refusal(UserError, embed_folder, tmp_path / "other", tmp_path / "s", embedder)


def test_same_size_and_mtime_but_other_bytes_are_found_by_content(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    path, status = images / "c.jpg", (images / "c.jpg").stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (0, 6, 0, 0)
    assert counts(embed_folder(images, tmp_path / "s", embedder, verify_content=True)) == (1, 5, 0, 0)
    assert_rows_are_their_files(tmp_path / "s", images, embedder)


def test_labels_are_nobodys_unless_asked_for(crops, tmp_path, embedder):
    embed_folder(crops, tmp_path / "s", embedder)
    assert {(row.identity, row.camera) for row in Store.open(tmp_path / "s")} == {(None, None)}


def test_labels_of_a_later_run_replace_those_of_the_store(crops, tmp_path, embedder, said):
    embed_folder(crops, tmp_path / "s", embedder)
    before = Store.open(tmp_path / "s").embeddings()
    report = embed_folder(crops, tmp_path / "s", embedder, labels="market1501")
    assert (report.embedded, report.relabelled) == (0, 40)
    assert "40 images of the store have another identity" in " ".join(said)
    store = Store.open(tmp_path / "s")
    assert set(store.cameras()) == {1, 2}
    assert np.array_equal(store.embeddings(), before)
    assert embed_folder(crops, tmp_path / "s", embedder, labels="market1501").relabelled == 0


def test_people_of_an_earlier_selection_keep_their_numbers_apart(crops, tmp_path, embedder):
    """`folder` numbers the people of both selections together."""
    for camera in ("camera 2", "camera 1"):
        embed_folder(open_source(crops / camera, root=crops), tmp_path / "s", embedder, labels="folder")
    numbers = {(row.name.partition("/")[0], row.identity) for row in Store.open(tmp_path / "s")}
    assert numbers == {("camera 1", 1), ("camera 2", 2)}


def test_what_is_no_image_is_counted_in_the_report(images, tmp_path, embedder):
    (images / "notes.txt").touch()
    (images / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    shutil.copy(images / "a.jpg", images / "bare")
    report = embed_folder(images, tmp_path / "s", embedder)
    assert report.embedded == 7
    assert report.to_dict()["skipped"] == {".txt": 1, ".mp4": 1}


def test_store_of_another_dtype_is_refused(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    assert "was made with dtype 'float32' and this run has 'float16'" in refusal(
        UserError, embed_folder, images, tmp_path / "s", embedder, dtype="float16"
    )


def test_store_of_another_bundle_is_refused(images, tmp_path, embedder):
    embed_folder(images, tmp_path / "s", embedder)
    manifest = embedder.bundle.manifest.model_copy(update={"source_weights_sha256": "0" * 64})
    other = Embedder(embedder.backend, manifest.model, Bundle(embedder.bundle.folder, manifest))
    assert "was made with bundle_id" in refusal(UserError, embed_folder, images, tmp_path / "s", other)
