"""Names and folders of the Market-1501 layout."""

from __future__ import annotations

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.market1501 import Label, open_market1501, parse_name
from mgn_deploy.validate import open_data


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("0002_c1s1_000451_03.jpg", (2, 1)),
        ("1501_c6s4_001877_01.jpg", (1501, 6)),
        ("0000_c3s2_000001_00.jpg", (0, 3)),  # distractor
        ("-1_c3s2_000001_00.jpg", (-1, 3)),  # junk
        ("0005_c12_f0023.jpg", (5, 12)),  # DukeMTMC's form
        ("00000001_c15s1.png", (1, 15)),
    ],
)
def test_a_name_gives_identity_and_camera(name, label):
    assert parse_name(name) == Label(*label)


@pytest.mark.parametrize(
    "name",
    [
        "person.jpg",
        "",
        "0002.jpg",
        "0002_s1_c1.jpg",
        "x0002_c1s1.jpg",
        " 0002_c1.jpg",
        "-2_c1s1.jpg",
        "--1_c1.jpg",
        "0002_c.jpg",
        "0002_C1s1.jpg",
        "0002c1s1.jpg",
        "1234567890_c1.jpg",
        "0002_c12345.jpg",
    ],
)
def test_another_name_gives_none(name):
    assert parse_name(name) is None


@pytest.fixture
def root(tmp_path):
    for folder, names in {
        "bounding_box_train": ["0007_c2s1_000002_00.jpg", "0007_c1s1_000001_00.jpg"],
        "query": ["0009_c1s1_000001_00.jpg"],
        "bounding_box_test": [
            "0009_c2s1_000001_00.jpg",
            "-1_c1s1_000001_00.jpg",
            "0000_c1s1_000001_00.JPG",
            "0010_c1s1_000001_00.png",
        ],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    return tmp_path


def test_the_three_subsets_are_their_folders_in_the_order_of_names(root):
    data = open_market1501(root)
    assert data.root == root
    assert [(image.path.name, image.identity, image.camera) for image in data.train] == [
        ("0007_c1s1_000001_00.jpg", 7, 1),
        ("0007_c2s1_000002_00.jpg", 7, 2),
    ]
    assert [(image.identity, image.camera) for image in data.query] == [(9, 1)]
    assert [(image.identity, image.camera) for image in data.gallery] == [(-1, 1), (0, 1), (9, 2), (10, 1)]


def test_other_files_are_passed_over(root):
    (root / "query" / "Thumbs.db").touch()
    (root / "query" / "readme.txt").touch()
    assert len(open_market1501(root).query) == 1


def test_a_subset_that_is_not_wanted_need_not_be_there(root):
    for path in (root / "bounding_box_train").iterdir():
        path.unlink()
    (root / "bounding_box_train").rmdir()
    assert open_market1501(root, subsets=("query", "gallery")).train == []
    assert len(open_data(f"market1501:{root}").gallery) == 4
    with pytest.raises(UserError, match="no folder 'bounding_box_train'"):
        open_market1501(root)


def test_an_image_whose_name_gives_no_identity_is_named(root):
    (root / "query" / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holiday\.jpg: the name gives no identity and camera"):
        open_market1501(root)


def test_an_empty_subset_is_a_sentence(root):
    (root / "query" / "0009_c1s1_000001_00.jpg").unlink()
    with pytest.raises(UserError, match=r"query holds no \.jpg or \.png image"):
        open_market1501(root)


def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        open_market1501(tmp_path / "nowhere")


@pytest.mark.parametrize("spec", ["market1501", "market1501:", "duke:/data", "/data", ""])
def test_another_kind_of_data_is_a_sentence_with_the_form(spec):
    with pytest.raises(UserError, match="give market1501:DIR"):
        open_data(spec)
