"""Market-1501's layout: names, folders, junk, and published counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from small_datasets import fill, market1501

from mgn_deploy.datasets import open_data, published
from mgn_deploy.datasets.market1501 import Label, open_market1501, parse_name
from mgn_deploy.datasets.published import PUBLISHED, Size
from mgn_deploy.errors import UserError

SHARED = Path("/work/shared/data/cuhk03-market")


@pytest.fixture
def root(tmp_path):
    return market1501(tmp_path)


# Market-1501's layout


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
    with pytest.raises(UserError, match=r"query. holds no image"):
        open_market1501(root)


def test_what_macos_leaves_beside_an_image_is_passed_over(root):
    (root / "query" / "._0009_c1s1_000001_00.jpg").touch()
    assert len(open_market1501(root).query) == 1


@pytest.mark.parametrize("name", ["0009_c3.webp", "0009_c3.bmp", "0009_c3.TIF", "0009_c3.jfif", "later/0009_c3.jpg"])
def test_whatever_embed_reads_is_an_image_of_the_gallery(root, name):
    place = root / "bounding_box_test" / name
    place.parent.mkdir(exist_ok=True)
    place.touch()
    assert [image.camera for image in open_market1501(root).gallery if image.identity == 9] == [2, 3]


def test_an_image_without_an_extension_is_known_by_its_content(root):
    Image.new("RGB", (8, 8)).save(root / "query" / "0011_c1", "PNG")
    assert [image.identity for image in open_market1501(root).query] == [9, 11]


@pytest.mark.parametrize(
    ("kind", "junk", "distractors"),
    [("market1501", {-1}, {0}), ("folder", {-1}, set()), ("dukemtmc", set(), set())],
)
def test_numbers_name_nobody_only_where_the_data_set_says_so(root, kind, junk, distractors):
    data = open_data(f"{kind}:{root}")
    assert (data.junk, data.distractors) == (junk, distractors)
    assert data.is_person(0) == (0 not in distractors)


def test_junk_is_no_class_to_train(root, said):
    fill(root, {"bounding_box_train": ["-1_c1s1_000001_00.jpg", "0000_c1s1_000001_00.jpg"]})
    assert {image.identity for image in open_data(f"folder:{root}", ("train",)).train} == {0, 7}
    data = open_data(f"market1501:{root}", ("train",))
    assert {image.identity for image in data.train} == {7}
    assert "2 training images of junk or distractors were left out" in data.notes
    assert data.notes[-1] in said


# Published counts


def test_equal_counts_give_no_notes(root, monkeypatch):
    sizes = {"train": Size(2, 1), "query": Size(1, 1), "gallery": Size(4, 2)}
    monkeypatch.setitem(published.PUBLISHED, "market1501", sizes)
    assert open_data(f"market1501:{root}", ("train", "query", "gallery")).notes == []


def test_each_count_that_differs_is_a_sentence(root, monkeypatch):
    sizes = {"train": Size(2, 1), "query": Size(3368, 1), "gallery": Size(4, 750)}
    monkeypatch.setitem(published.PUBLISHED, "market1501", sizes)
    assert open_data(f"market1501:{root}", ("train", "query", "gallery")).notes == [
        "query has 1 images of 1 identities; the published market1501 has 3,368 images of 1 identities",
        "gallery has 4 images of 2 identities; the published market1501 has 4 images of 750 identities",
    ]


def test_subsets_that_were_not_opened_are_not_counted(root):
    (note,) = open_data(f"market1501:{root}", ("query",)).notes
    assert note.startswith("query has")


def test_cuhk03s_two_versions_have_the_same_people():
    labeled, detected = PUBLISHED["cuhk03-labeled"], PUBLISHED["cuhk03-detected"]
    assert sum(size.images for size in labeled.values()) == 14096
    assert sum(size.images for size in detected.values()) == 14097
    assert [size.identities for size in labeled.values()] == [size.identities for size in detected.values()]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_a_subset_laid_out_as_market1501_opens_and_says_what_differs():
    data = open_data(f"market1501:{SHARED}", ("train", "query", "gallery"))
    assert (len(data.train), len(data.query), len(data.gallery)) == (6264, 200, 775)
    assert data.notes[0] == (
        "train has 6,264 images of 643 identities; the published market1501 has 12,936 images of 751 identities"
    )
    assert len(data.notes) == 3
