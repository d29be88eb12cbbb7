"""The gallery behind the service: what it shows of a store, and what it never opens."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from PIL import Image
from serving import EXTRA

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import writer as writer_module
from mgn_deploy.gallery.manifest import MANIFEST, StoreManifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.shards import Shard
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.serve import gallery as gallery_module
from mgn_deploy.serve.gallery import Gallery, NotShown, thumbnail_key

assert EXTRA  # `serving` skips where the extra is not installed
BUNDLE = "b" * 64


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def add(store: Path, source: Path | str, rows: list[Row], embeddings: np.ndarray) -> None:
    manifest = StoreManifest(
        bundle_id=BUNDLE,
        backend="onnxruntime",
        preprocessing=PREPROCESSING,
        dim=8,
        dtype="float32",
        source=source if isinstance(source, str) else source.as_uri(),
    )
    with StoreWriter(store, manifest) as writer:
        writer.add(rows, embeddings)


def row(name: str, **labels: object) -> Row:
    return Row(name, 1, 1, None, None, labels.pop("camera", None), **labels)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with an image and a link out of it, beside one that nobody is to see."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw_crop(1, 1, 0).save(folder / "in.png")
    draw_crop(2, 1, 0).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_of_a_store_that_grows_only_what_is_new_is_read(store: Path, source: Path, monkeypatch) -> None:
    monkeypatch.setattr(writer_module, "SHARD_ROWS", 4)
    monkeypatch.setattr(gallery_module, "REFRESH_SECONDS", 0)
    add(store, source, [row(f"{n}.jpg") for n in range(10)], unit_rows(10))
    gallery = Gallery(store, BUNDLE)
    old = {path.name for path in store.iterdir()}
    read: list[str] = []
    monkeypatch.setattr(Shard, "_read", lambda shard, path: read.append(path.name) or path.read_bytes())
    add(store, source, [row(f"{n}.jpg") for n in range(10, 19)], unit_rows(9, seed=1))
    read.clear()  # of the writer
    gallery.refresh()
    assert read
    assert not old & set(read)
    fresh, query = Gallery(store, BUNDLE), unit_rows(3, seed=2)
    assert gallery.search(query, 19) == fresh.search(query, 19)
    # A row that is embedded again is no longer where it was.
    add(store, source, [replace(row("2.jpg"), mtime_ns=2)], unit_rows(1, seed=3))
    gallery.refresh()
    assert gallery.search(query, 19) == Gallery(store, BUNDLE).search(query, 19)


def test_an_image_below_the_source_is_shown_without_its_metadata(store: Path, source: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    draw_crop(1, 1, 0).resize((400, 1000)).save(source / "exif.jpg", exif=exif, comment=b"a comment")
    add(store, source, [row("exif.jpg")], unit_rows(1))
    shown = Gallery(store, BUNDLE).thumbnail(thumbnail_key("exif.jpg"))
    image = Image.open(io.BytesIO(shown))
    assert (image.format, image.size) == ("JPEG", (128, 320))
    assert b"where it was taken" not in shown
    assert b"a comment" not in shown


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "{tmp}/secret.png", "link.png", "notes.txt", "gone.png"]
)
def test_what_lies_elsewhere_or_is_no_image_is_not_shown(store: Path, source: Path, tmp_path: Path, name: str) -> None:
    name = name.replace("{tmp}", str(tmp_path))
    add(store, source, [row(name)], unit_rows(1))
    with pytest.raises(NotShown):
        Gallery(store, BUNDLE).thumbnail(thumbnail_key(name))


def test_a_name_of_any_bytes_is_shown(store: Path, source: Path) -> None:
    name = os.fsdecode(b"\xff \xe4?#%2f.png")
    draw_crop(1, 1, 0).save(source / name, "PNG")
    add(store, source, [row(name)], unit_rows(1))
    assert Gallery(store, BUNDLE).thumbnail(thumbnail_key(name)).startswith(b"\xff\xd8")


def test_of_a_box_in_a_photo_the_box_is_shown(store: Path, source: Path) -> None:
    Image.new("RGB", (300, 200), "blue").save(source / "group.png")
    add(store, source, [row("group.png#2", box=(10.0, 20.0, 50.0, 100.0))], unit_rows(1))
    shown = Image.open(io.BytesIO(Gallery(store, BUNDLE).thumbnail(thumbnail_key("group.png#2"))))
    assert shown.size == (50, 100)


def colour(gallery: Gallery, name: str) -> tuple[int, ...]:
    """The size of a thumbnail and which of red, green and blue is strongest in its middle."""
    shown = Image.open(io.BytesIO(gallery.thumbnail(thumbnail_key(name))))
    return (*shown.size, int(np.argmax(shown.getpixel((shown.width // 2, shown.height // 2)))))


def test_of_a_box_in_a_frame_the_box_of_that_frame_is_shown(store: Path, source: Path) -> None:
    with av.open(str(source / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=160, height=96, pix_fmt="yuv420p")
        for left, right in (("red", "green"), ("blue", "red"), ("green", "blue")):
            frame = Image.new("RGB", (160, 96), left)
            frame.paste(right, (80, 0, 160, 96))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    left, right = (4.0, 4.0, 60.0, 80.0), (90.0, 10.0, 200.0, 400.0)  # that is clipped at the border
    rows = [row("clip.mp4#000002-1", frame=2, box=left), row("clip.mp4#000003-1", frame=3, box=right)]
    add(store, source, [*rows, row("clip.mp4#000009-1", frame=9, box=left)], unit_rows(3))
    gallery = Gallery(store, BUNDLE)
    assert colour(gallery, "clip.mp4#000002-1") == (60, 80, 2)
    assert colour(gallery, "clip.mp4#000003-1") == (70, 86, 2)
    with pytest.raises(NotShown, match="the video has 3 frames"):
        gallery.thumbnail(thumbnail_key("clip.mp4#000009-1"))


def test_a_member_of_an_archive_and_an_object_of_a_bucket_are_shown(store: Path, source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 80), "green").save(tmp_path / "green.png")
    with tarfile.open(source / "x.tar", "w") as archive:
        archive.add(tmp_path / "green.png", "deep/a.png")
    add(store, source, [row("x.tar/deep/a.png")], unit_rows(1))
    assert colour(Gallery(store, BUNDLE), "x.tar/deep/a.png") == (40, 80, 1)
    system = fsspec.filesystem("memory")
    system.pipe("/thumbnails/a.png", (tmp_path / "green.png").read_bytes())
    add(tmp_path / "bucket", "memory://thumbnails", [row("a.png#1", box=(0.0, 0.0, 20.0, 30.0))], unit_rows(1))
    gallery = Gallery(tmp_path / "bucket", BUNDLE)
    assert colour(gallery, "a.png#1") == (20, 30, 1)
    system.rm("/thumbnails", recursive=True)
    with pytest.raises(NotShown, match="no such object"):
        gallery.thumbnail(thumbnail_key("a.png#1"))


def test_a_store_that_changes_meanwhile_is_looked_at_once(store: Path, source: Path, tmp_path, monkeypatch) -> None:
    add(store, source, [row("in.png")], unit_rows(1))
    add(tmp_path / "pruned", source, [], unit_rows(0))
    gallery = Gallery(store, BUNDLE)
    for ask in (gallery.thumbnail, gallery.tag):
        stores = iter([Store.open(store), Store.open(tmp_path / "pruned")])
        monkeypatch.setattr(Gallery, "store", property(lambda _, stores=stores: next(stores)))
        assert ask(thumbnail_key("in.png"))


@pytest.mark.parametrize("times", [{"after": float("nan")}, {"before": float("inf")}])
def test_a_time_that_is_not_finite_is_refused(store: Path, source: Path, times: dict[str, float]) -> None:
    add(store, source, [row("a.png", time_s=1)], unit_rows(1))
    with pytest.raises(UserError, match=f"{next(iter(times))} must be a finite number"):
        Gallery(store, BUNDLE).search(unit_rows(1), 1, **times)


def test_a_filter_by_what_no_image_has_is_told(store: Path, source: Path) -> None:
    add(store, source, [row("a.png", camera=None)], unit_rows(1))
    gallery = Gallery(store, BUNDLE)
    assert gallery.unfit_filter(None, None, None) is None
    assert "`embed --labels` gives cameras" in (gallery.unfit_filter([1], None, None) or "")
    assert "no image of the gallery has a time" in (gallery.unfit_filter(None, 0.0, None) or "")
    add(store, source, [row("b.png", camera=1, time_s=2)], unit_rows(1))
    assert Gallery(store, BUNDLE).unfit_filter([1], 0.0, None) is None


def test_filters_by_camera_and_time_leave_the_nearest_of_the_others(store: Path, source: Path) -> None:
    rows = [row(f"{n}.png", camera=n % 3, time_s=None if n % 5 == 0 else n / 2) for n in range(60)]
    embeddings = unit_rows(60)
    add(store, source, rows, embeddings)
    query = unit_rows(3, seed=1)

    def by_hand(one: np.ndarray, wanted: list[int]) -> list[str]:
        return [rows[index].name for index in sorted(wanted, key=lambda index: -(embeddings[index] @ one))[:7]]

    found = Gallery(store, BUNDLE).search(query, 7, cameras=[0, 2], after=3, before=20)
    wanted = [n for n in range(60) if n % 3 != 1 and n % 5 and 3 <= n / 2 < 20]
    assert [[hit.row.name for hit in hits] for hits in found] == [by_hand(one, wanted) for one in query]
    everyone = Gallery(store, BUNDLE).search(query, 7)
    assert [[hit.row.name for hit in hits] for hits in everyone] == [by_hand(one, list(range(60))) for one in query]


def test_filters_in_blocks_are_those_in_one(store: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, source, [row(f"{n}.png", camera=n % 2) for n in range(50)], unit_rows(50))
    query = unit_rows(2, seed=1)
    whole = Gallery(store, BUNDLE).search(query, 9, cameras=[1])
    monkeypatch.setattr(gallery_module, "BLOCK_ROWS", 4)
    assert Gallery(store, BUNDLE).search(query, 9, cameras=[1]) == whole
    assert Gallery(store, BUNDLE).search(query, 9, cameras=[7]) == [[], []]


def test_an_empty_store_is_watched_until_it_has_images(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_module, "REFRESH_SECONDS", 0)
    add(store, source, [Row("bad.png", 1, 1, "broken", None, None)], np.full((1, 8), np.nan, np.float32))
    gallery = Gallery(store, BUNDLE)
    with pytest.raises(UserError, match="no image yet"):
        gallery.search(unit_rows(1), 1)
    assert (gallery.progress()["images"], gallery.progress()["failures"]) == (0, 1)
    add(store, source, [row("a.png", time_s=2.5)], unit_rows(1))
    assert (gallery.progress()["images"], gallery.progress()["seconds"]) == (1, (2.5, 2.5))
    assert gallery.search(unit_rows(1), 1)[0][0].row.name == "a.png"


def test_a_store_that_breaks_meanwhile_is_said_and_the_gallery_goes_on(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(gallery_module, "REFRESH_SECONDS", 0)
    add(store, source, [row("a.png")], unit_rows(1))
    gallery = Gallery(store, BUNDLE)
    (store / MANIFEST).write_text("{}")
    gallery.refresh()
    assert said[-1].startswith("the gallery stays as it was: ")
    assert len(gallery.search(unit_rows(1), 1)[0]) == 1


def test_another_bundles_store_is_refused(store: Path, source: Path) -> None:
    add(store, source, [row("a.png")], unit_rows(1))
    with pytest.raises(UserError, match="cannot be compared"):
        Gallery(store, "c" * 64)
