"""Files that cannot be read are rows with a reason; too many of them end the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from embedding_runs import assert_rows_are_their_files, counts, failures, names, refusal
from hostile import permissions_apply, png_bomb
from PIL import Image

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery import inputs
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store


def test_every_bad_file_is_a_row_with_its_reason(images, tmp_path, embedder):
    (images / "empty.jpg").touch()
    (images / "text.jpg").write_text("a letter")
    (images / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:900])
    Image.new("RGB", (1, 1)).save(images / "dot.png")
    (images / "bomb.png").write_bytes(png_bomb(8001))
    (images / "broken.jpg").symlink_to("nowhere")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "up").symlink_to("..")
    os.mkfifo(images / "pipe.jpg")
    report = embed_folder(images, tmp_path / "s", embedder)
    assert names(tmp_path / "s") == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    found = failures(tmp_path / "s")
    assert dict(report.failed) == found
    assert found["empty.jpg"] == "the file is empty"
    assert found["text.jpg"].startswith("not an image")
    assert found["cut.jpg"].startswith("image file is truncated")
    assert found["dot.png"].startswith("1x1 pixels is too small")
    assert found["bomb.png"] == "8001x8001 pixels is more than the limit of 64 megapixels"
    assert found["broken.jpg"] == "a link to a file that does not exist"
    assert found["loop.jpg"] == "Too many levels of symbolic links"
    assert found["up/images"] == "a link that leads back to a folder above it"
    assert found["pipe.jpg"] == "not a regular file"


def test_odd_names_come_back(images, tmp_path, embedder):
    odd = [
        b"a b.jpg",
        b"new\nline.jpg",
        b"quote'\".jpg",
        b"bytes\xff\xfe.jpg",
        b"-o.jpg",
        b"%20.jpg",
        "é漢.jpg".encode(),
        b"n" * 251 + b".jpg",
    ]
    for name in odd:
        shutil.copy(images / "a.jpg", os.fsencode(images) + b"/" + name)
    embed_folder(images, tmp_path / "s", embedder)
    store = Store.open(tmp_path / "s")
    assert {os.fsencode(row.name) for row in store.rows} >= set(odd)
    assert all(store.path(row).samefile(images / row.name) for row in store.rows)
    assert_rows_are_their_files(tmp_path / "s", images, embedder)
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (0, 14, 0, 0)


def test_source_folder_that_is_not_utf8_comes_back(images, tmp_path, embedder):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pics\xff#%20?"))
    images.rename(source)
    embed_folder(source, tmp_path / "s", embedder)
    store = Store.open(tmp_path / "s")
    assert store.path(store.rows[0]).samefile(source / "a.jpg")


def test_a_bundle_whose_folder_is_not_utf8_embeds(bundle_folder, images, tmp_path):
    """A manifest is UTF-8: the store does not say where the bundle was."""
    shutil.copytree(bundle_folder, tmp_path / "M\udce4rz")
    embed_folder(images, tmp_path / "s", Embedder.open(Bundle.open(tmp_path / "M\udce4rz"), "onnxruntime"))
    assert Store.open(tmp_path / "s").manifest.bundle_path is None


def test_file_that_may_not_be_read_is_a_row(images, tmp_path, embedder):
    (images / "b.jpg").chmod(0)
    with permissions_apply():
        report = embed_folder(images, tmp_path / "s", embedder)
    assert report.failed == [("b.jpg", "Permission denied")]
    (images / "b.jpg").chmod(0o644)
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (1, 5, 0, 0)
    assert failures(tmp_path / "s") == {}


def test_file_replaced_by_a_folder_after_listing_is_a_row(images, tmp_path, embedder, monkeypatch):
    def listed_then_replaced(folder):
        files = list_images(folder)
        (images / "b.jpg").unlink()
        (images / "b.jpg").mkdir()
        (images / "c.jpg").unlink()
        return files

    list_images = inputs.list_images
    monkeypatch.setattr(inputs, "list_images", listed_then_replaced)
    report = embed_folder(images, tmp_path / "s", embedder)
    assert report.failed == [("b.jpg", "not a regular file"), ("c.jpg", "No such file or directory")]
    assert names(tmp_path / "s") == ["a.jpg", "d.jpg", "e.jpg", "f.jpg"]


def test_only_bad_files_is_a_failed_gate(images, tmp_path, embedder):
    for path in images.iterdir():
        path.write_bytes(b"")
    sentence = refusal(GateFailed, embed_folder, images, tmp_path / "s", embedder)
    assert (
        f"not one of the 6 images of {str(images)!r} could be read; the first, 'a.jpg': the file is empty" == sentence
    )
    assert len(failures(tmp_path / "s")) == 6


def test_thousands_of_bad_files_do_not_stop_the_good_one(images, tmp_path, embedder):
    for number in range(2100):
        (images / f"{number:05d}.jpg").touch()
    report = embed_folder(images, tmp_path / "s", embedder)
    assert counts(report) == (6, 0, 2100, 0)
    assert len(names(tmp_path / "s")) == 6
    assert counts(embed_folder(images, tmp_path / "s", embedder)) == (0, 6, 2100, 0)
    assert len(list((tmp_path / "s").glob("*.npy"))) == 3


def test_too_many_failures_stop_and_what_was_embedded_is_kept(images, tmp_path, embedder):
    for name in ("b.jpg", "d.jpg", "e.jpg"):
        (images / name).write_bytes(b"")
    sentence = refusal(GateFailed, embed_folder, images, tmp_path / "s", embedder, batch_size=1, max_failures=1)
    assert sentence == "more than 1 images cannot be read; the last, 'd.jpg': the file is empty"
    assert names(tmp_path / "s") == ["a.jpg", "c.jpg"]
    assert counts(embed_folder(images, tmp_path / "s", embedder, max_failures=3)) == (1, 2, 3, 0)


def test_no_folder_and_no_image_leave_no_store(tmp_path, embedder):
    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty"):
        refusal(UserError, embed_folder, tmp_path / folder, tmp_path / "s", embedder)
    assert not (tmp_path / "s").exists()
