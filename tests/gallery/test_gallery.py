"""A folder into a store: every file a row, in order; whatever kills a run, the next one ends with the same store."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hostile import permissions_apply, png_bomb
from PIL import Image

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery import inputs, sources, writer
from mgn_deploy.gallery import run as gallery_run
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.sources import Source
from mgn_deploy.gallery.store import Store
from mgn_deploy.images import memory
from mgn_deploy.images.listing import ImageFile

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


@pytest.fixture
def images(tmp_path) -> Path:
    """Six drawn crops, a.jpg to f.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, letter in enumerate("abcdef"):
        draw_crop(number, 1, 0).save(folder / f"{letter}.jpg", quality=90)
    return folder


def opened_by(kind: type[OnnxRuntimeBackend], bundle: Bundle) -> Embedder:
    """The bundle opened by a backend that a test has changed."""
    return Embedder(kind(bundle.read(GRAPH), bundle.config), bundle.config, bundle)


def names(store: Path) -> list[str]:
    return [row.name for row in Store.open(store).rows]


def failures(store: Path) -> dict[str, str]:
    return {row.name: row.error for row in Store.open(store).failures}


def counts(report: gallery_run.GalleryReport) -> tuple[int, int, int, int]:
    return report.embedded, report.unchanged, len(report.failed), report.gone


def refusal(kind: type[Exception], action, *arguments, **options) -> str:
    with pytest.raises(kind) as refused:
        action(*arguments, **options)
    return str(refused.value)


def assert_rows_are_their_files(store: Path, folder: Path, embedder: Embedder, tolerance: float = 1e-5) -> None:
    opened = Store.open(store)
    for row, embedding in zip(opened.rows, opened.embeddings(), strict=True):
        alone = embedder.embed([folder / row.name])[0]
        assert np.abs(embedding - alone).max() < tolerance, row.name


def assert_same_store(one: Path, other: Path, tolerance: float = 0) -> None:
    """The same files byte for byte; with a tolerance the same rows and nearly the same embeddings."""
    if not tolerance:
        assert sorted(os.listdir(one)) == sorted(os.listdir(other))
        for path in one.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert np.abs(Store.open(one).embeddings() - Store.open(other).embeddings()).max() <= tolerance
    assert Store.open(one).rows == Store.open(other).rows
    assert Store.open(one).failures == Store.open(other).failures


# Rows and order


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


# Arrays, paths, PIL images


def test_arrays_paths_and_pil_images_agree(images, embedder):
    paths = sorted(images.iterdir())
    turned = Image.Exif()
    turned[0x0112] = 6
    draw_crop(9, 1, 0).save(images / "turned.jpg", exif=turned.tobytes())
    Image.fromarray(np.tile(np.arange(0, 60000, 1000, dtype=np.uint16), (90, 1))).save(images / "grey.png")
    by_path = embedder.embed(paths)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    assert np.abs(embedder.embed(arrays) - by_path).max() < 1e-6
    assert np.abs(embedder.embed([str(path) for path in paths]) - by_path).max() < 1e-6
    assert np.abs(embedder.embed([array[:, ::-1][:, ::-1] for array in arrays]) - by_path).max() < 1e-6
    paths += [images / "turned.jpg", images / "grey.png"]
    assert np.abs(embedder.embed([Image.open(path) for path in paths]) - embedder.embed(paths)).max() < 1e-6
    same_size = np.stack([np.asarray(Image.open(path).resize((50, 100))) for path in paths[:6]])
    assert np.abs(embedder.embed(same_size) - embedder.embed(list(same_size))).max() < 1e-6
    assert embedder.embed([]).shape == (0, embedder.dim)


@pytest.mark.parametrize(
    "source, expected",
    [
        (np.zeros((90, 30, 3), np.float32), "uint8 RGB [height, width, 3], not float32 [90, 30, 3]"),
        (np.zeros((90, 30), np.uint8), "not uint8 [90, 30]"),
        (np.zeros((90, 30, 4), np.uint8), "not uint8 [90, 30, 4]"),
        (np.zeros((3, 90, 30), np.uint8), "not uint8 [3, 90, 30]"),
        (np.zeros((0, 30, 3), np.uint8), "not uint8 [0, 30, 3]"),
        (np.zeros((1, 1, 3), np.uint8), "an image cannot be embedded: 1x1 pixels is too small"),
        (Image.new("F", (30, 90)), "an image cannot be embedded: pixels are 32-bit floats"),
        (None, "an image is a path, a PIL image or a uint8 array, not a NoneType"),
        (0, "not a int"),
        (b"a.jpg", "not a bytes"),
        ("no/such.jpg", "'no/such.jpg' cannot be embedded: No such file or directory"),
        (".", "'.' cannot be embedded: not a regular file"),
    ],
)
def test_what_is_no_image_gets_a_sentence(embedder, source, expected):
    assert expected in refusal(UserError, embedder.embed, [source])


def test_one_image_without_a_list_gets_a_sentence(embedder):
    assert "embed takes a list of images" in refusal(UserError, embedder.embed, "a.jpg")
    assert "not uint8 [30, 3]" in refusal(UserError, embedder.embed, np.zeros((90, 30, 3), np.uint8))


def test_truncated_image_opened_by_pil_gets_a_sentence(images, embedder):
    content = (images / "a.jpg").read_bytes()
    half = Image.open(io.BytesIO(content[: len(content) // 2]))
    assert "an image cannot be embedded: image file is truncated" in refusal(UserError, embedder.embed, [half])


# Bad files


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


# Again


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


# Files, patterns and lists


def test_folders_that_a_pattern_leaves_out_are_counted_and_told(tmp_path, said):
    for name in ("a.jpg", "notes.txt", "one/b.jpg", "two/deep/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        draw_crop(1, 1, 0).save(tmp_path / name, "JPEG") if name.endswith("jpg") else (tmp_path / name).write_text("-")
    folder = "folder of a pattern (give it by its name)"
    assert open_source(f"{tmp_path}/*").skipped == {folder: 2, ".txt": 1}
    assert f"{tmp_path}/*: 3 files skipped: 2 {folder}, 1 .txt" in said
    assert open_source(f"{tmp_path}/**").skipped == {".txt": 1}
    with pytest.raises(UserError, match=r"1 folder of a pattern"):
        open_source(f"{tmp_path}/t*")


def test_files_and_patterns_together_are_a_source(crops, tmp_path, embedder):
    source = open_source(crops / "camera 1/*.jpg", crops / "camera 2")
    embed_folder(source, tmp_path / "s", embedder)
    embed_folder(crops, tmp_path / "t", embedder)
    one, other = Store.open(tmp_path / "s"), Store.open(tmp_path / "t")
    assert sorted(row.name for row in one) == sorted(row.name for row in other)
    assert all(np.array_equal(one[row.name], other[row.name]) for row in one)


def test_root_keeps_the_names_of_single_images(crops, tmp_path, embedder):
    [path] = [next((crops / "camera 1").iterdir())]
    embed_folder(open_source(path, root=crops), tmp_path / "s", embedder)
    assert names(tmp_path / "s") == [f"camera 1/{path.name}"]
    assert "is not below" in refusal(UserError, open_source, path, root=tmp_path)


@pytest.mark.parametrize(
    "place, expected", [("none.jpg", "does not exist: give a folder"), ("*.gif", "no file matches")]
)
def test_what_is_not_there_is_a_sentence(images, place, expected):
    assert expected in refusal(UserError, open_source, images / place)


def test_boxes_of_a_photo_are_rows_of_their_own(images, tmp_path, embedder):
    files = [
        ImageFile(images / "a.jpg", "a.jpg#0", box=(0, 0, 30, 60)),
        ImageFile(images / "a.jpg", "a.jpg#1", box=(-10, 20, 40, 5000)),
        ImageFile(images / "a.jpg", "a.jpg#2", box=(500, 20, 40, 40)),
    ]
    report = embed_folder(Source(images.as_uri(), "boxes", files), tmp_path / "s", embedder)
    photo = Image.open(images / "a.jpg").convert("RGB")
    store = Store.open(tmp_path / "s")
    assert [row.box for row in store] == [(0, 0, 30, 60), (-10, 20, 40, 5000)]
    for name, edges in (("a.jpg#0", (0, 0, 30, 60)), ("a.jpg#1", (0, 20, 30, photo.height))):
        assert np.abs(store[name] - embedder.embed([photo.crop(edges)])[0]).max() < 1e-5
    [(name, reason)] = report.failed
    assert (name, reason[:38]) == ("a.jpg#2", "the box has less than 4x4 pixels insid")


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


# Cut off in the middle


@pytest.fixture(scope="module")
def mixed(crops, tmp_path_factory) -> Path:
    """The forty crops and four bad files between them."""
    folder = tmp_path_factory.mktemp("mixed") / "images"
    shutil.copytree(crops, folder)
    for place in (
        "camera 1/0001_c1s1_x.jpg",
        "camera 1/0005_c1s1_x.jpg",
        "camera 2/0003_c2s1_x.jpg",
        "zz.jpg",
    ):
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
