"""Files, patterns, photos with boxes and roots as the source of a store."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_runs import names, refusal
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.sources import Source
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.listing import ImageFile


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
