"""Crops of a store's rows, and tracks pooled into one embedding each."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import av
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy
from PIL import Image, ImageFilter

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs, open_source
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.tracks import TAKEN, pool_tracks, quality

# photo, track, height of the person's box, and whether the person is blurred there
SEEN = [(1, 1, 160, True), (2, 1, 160, False), (3, 1, 80, False), (1, 2, 100, False), (2, 2, 120, False)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three photos with two people, whose boxes are in gt.txt beside them."""
    folder, lines = tmp_path / "photos", []
    folder.mkdir()
    for photo in (1, 2, 3):
        image = Image.new("RGB", (320, 200), (90, 110, 90))
        for number, track, height, blurred in SEEN:
            if number == photo:
                person = draw_crop(track, 1, 0).resize((height // 2, height))
                left = 150 * track - 130
                image.paste(person.filter(ImageFilter.GaussianBlur(3)) if blurred else person, (left, 10))
                lines.append(f"{photo},{track},{left + 1},11,{height // 2},{height},1")
        image.save(folder / f"{photo:06d}.png")
    (tmp_path / "gt.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def store(photos, tmp_path, embedder) -> Path:
    embed_folder(open_inputs([photos], boxes=photos.parent / "gt.txt"), tmp_path / "s", embedder)
    return tmp_path / "s"


def unit_mean(store: Store, names: list[str]) -> np.ndarray:
    mean = np.stack([store[name] / np.linalg.norm(store[name]) for name in names]).mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_a_track_is_the_mean_of_its_largest_and_sharpest_images(store, tmp_path):
    done = pool_tracks(store, tmp_path / "t", best=1)
    assert (done.tracks, done.images, done.taken, done.unreadable) == (2, 5, 2, 0)
    images, tracks = Store.open(store), Store.open(tmp_path / "t")
    assert [(row.name, row.track) for row in tracks] == [("000002.png#1", 1), ("000002.png#2", 2)]
    assert np.abs(tracks.embeddings() - [unit_mean(images, [row.name]) for row in tracks]).max() < 1e-6
    pool_tracks(store, tmp_path / "t2", best=2)
    [first, _] = Store.open(tmp_path / "t2").embeddings()
    candidates = [["000002.png#1", "000001.png#1"], ["000002.png#1", "000003.png#1"]]
    assert min(np.abs(first - unit_mean(images, names)).max() for names in candidates) < 1e-6


def test_all_images_are_taken_where_there_are_no_more_and_the_table_names_them(store, tmp_path):
    pool_tracks(store, tmp_path / "t", best=8)
    images, tracks = Store.open(store), Store.open(tmp_path / "t")
    table = pq.read_table(tmp_path / "t" / TAKEN).to_pylist()
    for row, embedding in zip(tracks, tracks.embeddings(), strict=True):
        taken = [line for line in table if line["track_row"] == row.name]
        assert [line["rank"] for line in taken] == list(range(1, len(taken) + 1))
        names = [line["image"] for line in taken]
        assert sorted(names) == [f"{photo:06d}.png#{track}" for photo, track, _, _ in SEEN if track == row.track]
        assert np.abs(embedding - unit_mean(images, names)).max() < 1e-6
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    areas = {line["image"]: line["area"] for line in table}
    assert areas == {f"{p:06d}.png#{t}": height // 2 * height for p, t, height, _ in SEEN}


def test_sharpness_falls_with_blur_and_not_with_size():
    crop = draw_crop(1, 1, 0).resize((128, 256))
    assert quality(crop.filter(ImageFilter.GaussianBlur(4)))[1] < quality(crop)[1] / 2
    area, sharpness = quality(crop.resize((64, 128)))
    assert area == 64 * 128
    assert 0.5 < sharpness / quality(crop)[1] < 2


def test_a_store_of_tracks_takes_no_images_and_no_other_tracks(store, photos, tmp_path, embedder):
    pool_tracks(store, tmp_path / "t")
    with pytest.raises(UserError, match="was made with preprocessing"):
        embed_folder(open_inputs([photos], boxes=photos.parent / "gt.txt"), tmp_path / "t", embedder)
    with pytest.raises(UserError, match="was made with preprocessing"):
        pool_tracks(store, tmp_path / "t", best=3)
    (photos.parent / "gt.txt").write_text("1,1,21,11,95,190,1")
    embed_folder(open_inputs([photos], boxes=photos.parent / "gt.txt"), tmp_path / "one", embedder)
    with pytest.raises(UserError, match="holds other rows already"):
        pool_tracks(tmp_path / "one", tmp_path / "t")


def test_tracks_that_are_pooled_again_after_the_last_step_stay_as_they_are(store, tmp_path):
    done = pool_tracks(store, tmp_path / "t")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    assert pool_tracks(store, tmp_path / "t") == done
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


def test_labels_stay_where_a_tracks_images_agree(photos, tmp_path, embedder):
    source = open_inputs([photos], boxes=photos.parent / "gt.txt")
    embed_folder(source, tmp_path / "s", embedder, labels="track")
    pool_tracks(tmp_path / "s", tmp_path / "t")
    assert [row.identity for row in Store.open(tmp_path / "t")] == [1, 2]


def test_tracks_of_two_folders_are_different(photos, tmp_path, embedder):
    for cut in ("x", "y"):
        (photos / cut).mkdir()
    (photos / "000001.png").rename(photos / "x/1.png")
    (photos / "000002.png").rename(photos / "y/2.png")
    rows = [f"{'xy'[p - 1]}/{p}.png,{t},{150 * t - 130},10,{h // 2},{h}" for p, t, h, _ in SEEN if p < 3]
    (tmp_path / "b.csv").write_text("\n".join(["path,track,left,top,width,height", *rows]))
    embed_folder(open_inputs([photos], boxes=tmp_path / "b.csv"), tmp_path / "s", embedder)
    assert pool_tracks(tmp_path / "s", tmp_path / "t").tracks == 4


def test_images_that_are_gone_come_last_and_are_counted(store, photos, tmp_path, said):
    (photos / "000002.png").unlink()
    done = pool_tracks(store, tmp_path / "t", best=1)
    assert done.unreadable == 2
    assert [row.name for row in Store.open(tmp_path / "t")][1] == "000001.png#2"
    assert any("2 of 5 images cannot be read again" in sentence for sentence in said)


def test_a_store_without_tracks_and_a_k_of_0_are_sentences(store, photos, tmp_path, embedder):
    embed_folder(photos, tmp_path / "whole", embedder)
    with pytest.raises(UserError, match="has no tracks"):
        pool_tracks(tmp_path / "whole", tmp_path / "t")
    with pytest.raises(UserError, match="take 1 or more"):
        pool_tracks(store, tmp_path / "t", best=0)


def test_a_videos_tracks_are_pooled_on_the_command_line(photos, tmp_path, bundle_folder):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 200, "yuv420p"
        for path in sorted(photos.iterdir()):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(path))))
        container.mux(stream.encode())
    options = ["--boxes", tmp_path / "gt.txt", "--bundle", bundle_folder, "--backend", "onnxruntime"]
    options += ["--pool-tracks", tmp_path / "at once", "--json"]
    done = mgn_deploy("embed", "--video", tmp_path / "clip.mp4", "-o", tmp_path / "v", *options)
    assert done.exit_code == 0, done.output
    pooled = json.loads(done.stdout)["pooled"]
    assert (pooled["store"], pooled["tracks"], pooled["taken"]) == (str(tmp_path / "at once"), 2, 5)
    done = mgn_deploy("store", "pool-tracks", tmp_path / "v", "-o", tmp_path / "t", "--best", 1, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "store": str(tmp_path / "t"),
        "tracks": 2,
        "images": 5,
        "taken": 2,
        "unreadable": 0,
    }
    tracks = Store.open(tmp_path / "t")
    assert [row.name for row in tracks] == ["clip.mp4#000002-1", "clip.mp4#000002-2"]
    assert tracks.image(tracks.rows[0]).size == (80, 160)
    page = tmp_path / "map.html"
    assert mgn_deploy("map", tmp_path / "v", "-o", page).exit_code == 0
    assert len(set(re.findall(r'"jpeg":\s*"(\S+)"', page.read_text()))) == 5


# Store.image


def test_image_is_the_crop_of_a_box_a_photo_and_a_member(store, photos, tmp_path, embedder):
    boxes = Store.open(store)
    for row in boxes:
        left, top, width, height = map(int, row.box)
        expected = Image.open(photos / row.name.partition("#")[0]).crop((left, top, left + width, top + height))
        assert np.array_equal(np.asarray(boxes.image(row)), np.asarray(expected))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(photos / "000001.png", "deep/a.png")
    embed_folder(open_source(tmp_path / "x.tar"), tmp_path / "members", embedder)
    members = Store.open(tmp_path / "members")
    assert np.array_equal(np.asarray(members.image(members.rows[0])), np.asarray(Image.open(photos / "000001.png")))


def test_image_of_what_is_gone_is_a_sentence(store, photos, tmp_path, embedder):
    (photos / "000001.png").unlink()
    boxes = Store.open(store)
    with pytest.raises(UserError, match=r"'000001.png#1' of .* cannot be read: no such file"):
        boxes.image(boxes.rows[0])
    system = fsspec.filesystem("memory")
    system.pipe("/tracks/a.png", (photos / "000002.png").read_bytes())
    embed_folder(open_source("memory://tracks"), tmp_path / "remote", embedder)
    system.rm("/tracks", recursive=True)
    remote = Store.open(tmp_path / "remote")
    with pytest.raises(UserError, match=r"'a.png' of .* cannot be read: no such object"):
        remote.image(remote.rows[0])


def test_a_rank_page_shows_boxes_and_frames(store, tmp_path, bundle_folder):
    done = mgn_deploy("search", store, store, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 + 5 * 4
