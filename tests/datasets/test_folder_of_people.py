"""A folder a person: who asks, who is looked for, and cameras in names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_datasets import fill, market1501

from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.errors import UserError


@pytest.fixture
def root(tmp_path):
    return market1501(tmp_path)


def test_the_first_image_of_each_person_is_a_query_and_the_others_are_the_gallery(tmp_path):
    root = fill(
        tmp_path / "people", {"zoe": ["b.jpg", "a.png"], "anna/in": ["2.jpg", "1.jpg", "3.webp"], "one": ["x.jpg"]}
    )
    data = open_data(f"identities:{root}")
    assert data.people == {"anna": 1, "one": 2, "zoe": 3}
    assert [(image.path.name, image.identity) for image in data.query] == [("1.jpg", 1), ("a.png", 3)]
    assert [(image.path.name, image.identity) for image in data.gallery] == [
        ("2.jpg", 1),
        ("3.webp", 1),
        ("x.jpg", 2),
        ("b.jpg", 3),
    ]
    assert not data.has_cameras


@pytest.mark.parametrize("form", ["cam_{}/x.jpg", "cam{}_x.jpg", "Camera-{} x.jpg"])
def test_with_cameras_each_person_asks_once_by_each_camera(tmp_path, form):
    root = tmp_path / "people"
    for person in ("anna", "zoe"):
        for camera in (1, 2):
            for image in "ab":
                name = Path(person, form.format(camera).replace("x", image))
                fill(root, {str(name.parent): [name.name]})
    data = open_data(f"identities:{root}")
    assert data.has_cameras
    assert [(image.identity, image.camera) for image in data.query] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [(image.identity, image.camera) for image in data.gallery] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_cameras_that_some_images_lack_are_not_used_and_loose_images_are_counted(tmp_path):
    root = fill(tmp_path / "people", {".": ["loose.jpg"], "anna": ["cam_1.jpg", "2.jpg"], "zoe": ["cam_1.jpg"]})
    data = open_data(f"identities:{root}")
    assert not data.has_cameras
    assert data.notes == [
        "1 images beside the people's folders were left out, 'loose.jpg' the first",
        "1 of 3 images name no camera (cam_1), so that cameras are not used",
    ]


@pytest.mark.parametrize("kind", ["folder", "identities"])
def test_files_that_are_no_images_are_in_the_notes_too(root, tmp_path, kind):
    folder = shutil.copytree(root, tmp_path / "people")
    (folder / "query/notes.txt").touch()
    (folder / "query/clip.mp4").touch()
    (note,) = open_data(f"{kind}:{folder}").notes
    assert note.endswith("2 files skipped: 1 .mp4, 1 .txt")


def test_training_takes_everybody_and_leaves_nobody_to_evaluate(tmp_path):
    root = fill(tmp_path / "people", {"anna": ["1.jpg", "2.jpg"], "zoe": ["1.jpg"]})
    data = open_data(f"identities:{root}", ("train", "query", "gallery"))
    assert (len(data.train), data.query, data.gallery) == (3, [], [])
    assert data.notes == ["everybody is trained on: there is nobody left to evaluate with"]


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        ({"anna": ["1.jpg", "2.jpg"]}, "holds the folders of 1 people with images, and needs two"),
        ({"anna": ["1.jpg"], "zoe": ["1.jpg"]}, "holds no person with two images"),
        ({"anna": ["notes.txt"]}, "holds no image"),
    ],
)
def test_a_folder_in_which_nobody_can_be_looked_for_is_a_sentence(tmp_path, folders, sentence):
    with pytest.raises(UserError, match=sentence):
        open_data(f"identities:{fill(tmp_path / 'people', folders)}")


def test_the_published_folder_names_and_png_are_read(tmp_path):
    folder = fill(
        tmp_path / "CUHK03-NP" / "labeled", {"query": ["0003_c1_22.png"], "bounding_box_test": ["0003_c2_1.png"]}
    )
    data = open_data(f"cuhk03-labeled:{folder}")
    assert [(image.identity, image.camera) for image in (*data.query, *data.gallery)] == [(3, 1), (3, 2)]


def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        open_market1501(tmp_path / "nowhere")
