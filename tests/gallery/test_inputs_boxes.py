"""Boxes of any detector: each format gives the same rows, which are the crops that a hand would cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import mgn_deploy
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs
from mgn_deploy.gallery.store import Store

SIZE = (400, 256)
# photo, track, left, top, width, height; the photos are named as frames of a sequence.
PEOPLE = [(1, 7, 16, 32, 64, 128), (1, 9, 160, 48, 56, 144), (2, 7, 48, 32, 64, 128), (2, 9, 200, 64, 56, 144)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """000001.png and 000002.png with two drawn people each, at PEOPLE's boxes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in (1, 2):
        image = Image.new("RGB", SIZE, (90, 110, 90))
        for number, track, left, top, width, height in PEOPLE:
            if number == photo:
                image.paste(draw_crop(track, 1, 0).resize((width, height)), (left, top))
        image.save(folder / f"{photo:06d}.png")
    return folder


def written(path: Path, content: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def mot(folder: Path) -> Path:
    lines = [f"{p},{t},{x + 1},{y + 1},{w},{h},1,1,0.9" for p, t, x, y, w, h in PEOPLE]
    return written(folder / "gt.txt", "\n".join([*lines, "1,3,5,5,50,90,0,1,1", "2,4,5,5,50,90,1,3,1"]))


def yolo(folder: Path) -> Path:
    for photo in (1, 2):
        lines = [
            f"0 {(x + w / 2) / SIZE[0]} {(y + h / 2) / SIZE[1]} {w / SIZE[0]} {h / SIZE[1]} 0.9 {t}"
            for p, t, x, y, w, h in PEOPLE
            if p == photo
        ]
        written(folder / f"yolo/{photo:06d}.txt", "\n".join([*lines, "2 0.5 0.5 0.1 0.1 0.9 4", ""]))
    return folder / "yolo"


def coco(folder: Path) -> Path:
    boxes = [{"image_id": p + 10, "category_id": 1, "bbox": [x, y, w, h], "track_id": t} for p, t, x, y, w, h in PEOPLE]
    car = {"image_id": 11, "category_id": 3, "bbox": [0, 0, 50, 50]}
    crowd = {"image_id": 11, "category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1}
    photos = [{"id": p + 10, "file_name": f"{p:06d}.png"} for p in (1, 2)]
    categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    content = {"images": photos, "annotations": [*boxes, car, crowd], "categories": categories}
    return written(folder / "coco.json", json.dumps(content))


def results(folder: Path) -> Path:
    boxes = [
        {"image_id": p, "category_id": 1, "bbox": [x, y, w, h], "score": 0.9, "track_id": t}
        for p, t, x, y, w, h in PEOPLE
    ]
    return written(folder / "results.json", json.dumps(boxes))


def table(folder: Path) -> Path:
    lines = [f"{p:06d}.png;{x};{y};{w};{h};{t};person" for p, t, x, y, w, h in PEOPLE]
    content = "\r\n".join(["path;Left;Top;Width;Height;track;class", *lines, "000001.png;1;1;50;90;5;car", ""])
    return written(folder / "boxes.csv", content)


def parquet(folder: Path) -> Path:
    columns = zip(*((f"{p:06d}.png", t, float(x), y, w, h) for p, t, x, y, w, h in PEOPLE), strict=True)
    names = ["path", "track", "left", "top", "width", "height"]
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), folder / "boxes.parquet")
    return folder / "boxes.parquet"


FORMATS = {
    mot: ("MOTChallenge's format", {"boxes with flag 0": 1, "boxes of another class": 1}),
    yolo: ("YOLO's format", {"boxes of another class": 2}),
    coco: ("COCO's format", {"boxes of another class": 1, "boxes of crowds": 1}),
    results: ("COCO's format of results", {}),
    table: ("a table", {"boxes of another class": 1}),
    parquet: ("a table", {}),
}
formats = pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)


@formats
def test_every_format_gives_the_same_rows(photos, tmp_path, said, write):
    source = open_inputs([photos], boxes=write(tmp_path))
    found = [(file.name, file.track, file.box) for file in source.files]
    assert found == [(f"{p:06d}.png#{t}", t, (x, y, w, h)) for p, t, x, y, w, h in PEOPLE]
    name, skipped = FORMATS[write]
    assert source.skipped == skipped
    assert any(name in sentence and "4 boxes" in sentence for sentence in said)


def test_rows_are_the_crops(photos, tmp_path, embedder):
    embed_folder(open_inputs([photos], boxes=mot(tmp_path)), tmp_path / "s", embedder, labels="track")
    store = Store.open(tmp_path / "s")
    for row, (photo, track, left, top, width, height) in zip(store, PEOPLE, strict=True):
        crop = Image.open(photos / f"{photo:06d}.png").crop((left, top, left + width, top + height))
        assert np.abs(store[row.name] - embedder.embed([crop])[0]).max() < 1e-5
        assert (row.identity, row.track, row.box) == (track, track, (left, top, width, height))


def test_boxes_without_tracks_are_numbered_in_their_photo_whatever_is_taken(photos, tmp_path):
    lines = ["path,left,top,width,height,class,score"]
    lines += ["000001.png,0,0,50,90,car,0.9", "000001.png,5,0,50,90,person,0.2", "000001.png,9,0,50,90,person,0.8"]
    path = written(tmp_path / "b.csv", "\n".join(lines))
    assert [file.name for file in open_inputs([photos], boxes=path).files] == ["000001.png#2", "000001.png#3"]
    strict = open_inputs([photos], boxes=path, min_score=0.5)
    assert [file.name for file in strict.files] == ["000001.png#3"]
    assert strict.skipped["boxes with a score below 0.5"] == 1
    every = open_inputs([photos], boxes=path, classes=["all"])
    assert len(every.files) == 3


def test_a_negative_score_is_one_unless_it_is_motchallenges_minus_1(photos, tmp_path):
    lines = ["1,-1,5,5,60,100,-0.3", "1,-1,9,9,60,100,0.8", "1,-1,15,5,60,100,-1"]
    path = written(tmp_path / "det.txt", "\n".join(lines))
    assert len(open_inputs([photos], boxes=path).files) == 3
    assert [file.name for file in open_inputs([photos], boxes=path, min_score=0.5).files] == [
        "000001.png#2",
        "000001.png#3",
    ]


def test_boxes_are_clipped_and_those_outside_are_rows_with_their_reason(photos, tmp_path, embedder):
    boxes = ["-20,-10,60,120", "370,200,60,120", "500,10,50,90", "10,10,3,90", "-60,10,62,90", "10,10,-5,90"]
    lines = "\n".join(["path,left,top,width,height", *(f"000001.png,{box}" for box in boxes)])
    source = open_inputs([photos / "000001.png"], boxes=written(tmp_path / "b.csv", lines))
    report = embed_folder(source, tmp_path / "s", embedder)
    store = Store.open(tmp_path / "s")
    assert [row.name for row in store] == ["000001.png#1", "000001.png#2"]
    with Image.open(photos / "000001.png") as photo:
        clipped = [photo.crop((0, 0, 40, 110)), photo.crop((370, 200, 400, 256))]
    assert np.abs(store.embeddings() - embedder.embed(clipped)).max() < 1e-5
    reason = "the box has less than 4x4 pixels inside the 400x256 image"
    assert report.failed == [(f"000001.png#{number}", reason) for number in (3, 4, 5, 6)]


def test_yolos_fractions_are_of_the_upright_photo(tmp_path, embedder):
    photo = Image.new("RGB", (200, 300), "grey")
    photo.paste(draw_crop(3, 1, 0).resize((80, 160)), (20, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "photos").mkdir()
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos/a.png", exif=turned)
    written(tmp_path / "yolo/a.txt", f"0 {60 / 200} {140 / 300} {80 / 200} {160 / 300}\n")
    source = open_inputs([tmp_path / "photos"], boxes=tmp_path / "yolo")
    embed_folder(source, tmp_path / "s", embedder)
    crop = photo.crop((20, 60, 100, 220))
    assert np.abs(Store.open(tmp_path / "s").embeddings() - embedder.embed([crop])).max() < 1e-5


def test_a_broken_photo_fails_all_its_boxes_and_no_others(photos, tmp_path, embedder):
    content = (photos / "000001.png").read_bytes()
    (photos / "000001.png").write_bytes(b"no image")
    for boxes in (yolo(tmp_path), mot(tmp_path)):
        report = embed_folder(open_inputs([photos], boxes=boxes), tmp_path / f"s-{boxes.name}", embedder)
        assert report.embedded == 2
        assert [name for name, _ in report.failed] == ["000001.png#7", "000001.png#9"]
        assert all("not an image" in reason for _, reason in report.failed)
    (photos / "000001.png").write_bytes(content)
    assert embed_folder(open_inputs([photos], boxes=yolo(tmp_path)), tmp_path / "s-yolo", embedder).embedded == 2


def test_a_box_that_moved_is_embedded_again_and_others_are_not(photos, tmp_path, embedder):
    path = table(tmp_path)
    embed_folder(open_inputs([photos], boxes=path), tmp_path / "s", embedder)
    assert embed_folder(open_inputs([photos], boxes=path), tmp_path / "s", embedder).unchanged == 4
    path.write_text(path.read_text().replace("000002.png;200;64;56", "000002.png;201.3;64;56"))
    report = embed_folder(open_inputs([photos], boxes=path), tmp_path / "s", embedder)
    assert (report.embedded, report.unchanged, report.gone) == (1, 3, 0)
    report = embed_folder(open_inputs([photos], boxes=path), tmp_path / "s", embedder, verify_content=True)
    assert (report.embedded, report.unchanged) == (0, 4)


def test_photos_without_boxes_and_boxes_without_photos_are_counted(photos, tmp_path, said):
    (photos / "000001.png").rename(photos / "000003.png")
    source = open_inputs([photos], boxes=mot(tmp_path))
    assert [file.name for file in source.files] == ["000002.png#7", "000002.png#9"]
    assert source.skipped["boxes of photos that are not given"] == 2
    assert source.skipped["photos without a box"] == 1
    assert any("2 boxes are in photos that are not given, the first in 'frame 1'" in sentence for sentence in said)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("b.txt", "", "has no boxes in a format that is known"),
        ("b.txt", "a letter\n", "has no boxes in a format that is known"),
        ("b.txt", "0 0.5 0.5 0.2 0.2\n", "give the folder that holds the .txt of every photo"),
        ("b.txt", "1,1,5,5,20,x,1,-1,-1,-1\n", "has no boxes in a format"),
        ("b.txt", "1,1,5,5,20,40,1\n1,2,5,5,20,x,1\n", "line 2: 'x' is no number"),
        ("b.txt", "1,1,5,5,20,40,1\n1,2,5,5,20,nan,1\n", "line 2: 'nan' is no number"),
        ("b.txt", "1,1,5,5,20,40,1\n1,2,1e39,5,20,40,1\n", "line 2: '1e39' is no number, or too large"),
        ("b.txt", "1,1,5,5,20,40,1\n0,2,5,5,20,40,1\n", "line 2: frame 0; MOTChallenge counts frames from 1"),
        ("b.txt", "1,1,5,5,20,40,1\n1,2\n", "line 2: 2 values"),
        ("b.txt", "1,1,5,5,20,40,0\n", "holds no box that is taken, 1 boxes with flag 0 left out"),
        ("b.txt", "9,1,5,5,20,40,1\n", "not one of its 1 boxes is in a photo of .*the first is in 'frame 9'"),
        ("b.json", "{", "is no JSON in COCO's format"),
        ("b.json", '{"images": [], "annotations": [{"image_id": 1}]}', "is no JSON in COCO's format"),
        ("b.json", '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}]', "is no JSON in COCO's format"),
        ("b.json", '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, "x"]}]', "annotation 0: 'x' is no number"),
        ("b.json", '[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40]}]', "--box-class names the classes"),
        ("b.json", "[" * 100000, "is no JSON in COCO's format"),
        ("b.csv", "path,left,top,width\na.jpg,1,1,1\n", "has to name the columns left, top, width, height"),
        ("b.csv", "left,top,width,height\n1,1,1,1\n", "lacks a column path"),
        ("b.csv", "path,left,top,width,height\n,1,1,1,1\n", "line 2: the path is empty"),
        ("b.csv", "path,left,top,width,height,track\na,1,1,1,1,1.5\n", "line 2: '1.5' is no whole number"),
        ("yolo/a.txt", "0 0.5 0.5\n", "line 1: 3 values; YOLO has class"),
        ("yolo/a.md", "", "holds no .txt"),
    ],
)
def test_boxes_that_cannot_be_used_are_a_sentence(photos, tmp_path, name, content, sentence):
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=sentence):
        open_inputs([photos], boxes=path.parent if "/" in name else path)


def test_track_labels_need_tracks(photos, tmp_path, embedder):
    with pytest.raises(UserError, match="has no tracks"):
        embed_folder(photos, tmp_path / "s", embedder, labels="track")


def test_embed_takes_boxes_on_the_command_line(photos, tmp_path, bundle_folder):
    options = ["--boxes", yolo(tmp_path), "--box-class", "2", "--bundle", bundle_folder, "--backend", "onnxruntime"]
    done = mgn_deploy("embed", photos, "-o", tmp_path / "s", *options)
    assert done.exit_code == 0, done.output
    assert "2 embedded" in done.stdout
    assert "4 skipped" in done.stdout
