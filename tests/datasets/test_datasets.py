"""Datasets: names and folders of each layout, kinds of `--data`, places a level off, published counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mgn_deploy.choices import DATA_KINDS
from mgn_deploy.datasets import open_data, published
from mgn_deploy.datasets.market1501 import Label, open_market1501, parse_name
from mgn_deploy.datasets.published import PUBLISHED, Size
from mgn_deploy.errors import UserError

SHARED = Path("/work/shared/data/cuhk03-market")


def fill(root: Path, folders: dict[str, list[str]]) -> Path:
    """Empty files of these names: opening a dataset decodes no image."""
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).touch()
    return root


@pytest.fixture
def root(tmp_path):
    return fill(
        tmp_path / "data" / "Market-1501-v15.09.15",
        {
            "bounding_box_train": ["0007_c2s1_000002_00.jpg", "0007_c1s1_000001_00.jpg"],
            "query": ["0009_c1s1_000001_00.jpg"],
            "bounding_box_test": [
                "0009_c2s1_000001_00.jpg",
                "-1_c1s1_000001_00.jpg",
                "0000_c1s1_000001_00.JPG",
                "0010_c1s1_000001_00.png",
            ],
        },
    )


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


# A folder a person


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


# Kinds


@pytest.mark.parametrize("spec", ["market1501", "market1501:", "/data", ""])
def test_data_without_kind_or_folder_is_a_sentence_with_the_form(spec):
    with pytest.raises(UserError, match="give KIND:DIR, KIND being one of market1501, dukemtmc"):
        open_data(spec)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("duke", "dukemtmc"), ("Market-1501", "market1501"), ("msmt", "msmt17"), ("cuhk03-label", "cuhk03-labeled")],
)
def test_an_unknown_kind_is_a_sentence_with_the_nearest_and_all_others(wrong, right):
    with pytest.raises(UserError, match=f"no kind of dataset '{wrong}', did you mean '{right}'") as error:
        open_data(f"{wrong}:/data")
    assert all(kind in str(error.value) for kind in DATA_KINDS)


def test_cuhk03_without_its_crops_is_a_sentence_with_both():
    with pytest.raises(UserError, match="give cuhk03-labeled:DIR for the hand-drawn boxes or cuhk03-detected:DIR"):
        open_data("cuhk03:/data")


@pytest.mark.parametrize("kind", ["market1501", "dukemtmc", "folder"])
def test_kinds_in_market_layout_differ_in_name_and_published_counts_alone(root, kind):
    data = open_data(f"{kind}:{root}")
    assert data.name == kind
    assert len(data.gallery) == 4
    assert bool(data.notes) == (kind != "folder")


def test_a_tilde_is_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_data(f"folder:~/{root.name}").root == root


def test_opening_a_dataset_imports_neither_torch_nor_what_reads_matlab_files(root):
    script = (
        f"import sys; from mgn_deploy.datasets import open_data; open_data('folder:{root}'); "
        "print(sorted({'torch', 'h5py', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Places a level off


@pytest.mark.parametrize("place", ["..", "query", "bounding_box_test"])
def test_a_place_one_level_off_is_found(root, place):
    data = open_data(f"folder:{root / place}")
    assert data.root.samefile(root)
    assert len(data.query) == 1


def test_the_folder_one_is_in_may_be_given_as_a_dot(root, monkeypatch):
    monkeypatch.chdir(root / "query")
    assert open_data("folder:.").root == root


def test_a_place_that_could_mean_two_datasets_names_both(root):
    other = fill(root.parent / "DukeMTMC-reID", {"query": ["0001_c1_f0000001.jpg"]})
    with pytest.raises(UserError, match="could mean") as error:
        open_data(f"folder:{root.parent}")
    assert str(other) in str(error.value)
    assert str(root) in str(error.value)


@pytest.mark.parametrize("kind", ["market1501", "msmt17", "cuhk03-labeled", "cuhk03-detected"])
def test_a_place_without_a_dataset_is_a_sentence_with_what_is_looked_for(tmp_path, kind):
    wanted = {"market1501": "bounding_box_train", "msmt17": "list_query.txt"}.get(kind, "cuhk03_new_protocol_config_")
    (tmp_path / "in" / "between" / "query").mkdir(parents=True)
    with pytest.raises(UserError, match=f"does not hold .*{wanted}.*neither does the folder above it nor one in it"):
        open_data(f"{kind}:{tmp_path}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_a_sentence_or_passed_over(root):
    closed = fill(root.parent / "closed", {"query": ["0001_c1.jpg"]})
    closed.chmod(0)
    (root / "query").chmod(0)
    try:
        assert open_data(f"folder:{root.parent}", ("gallery",)).root == root
        with pytest.raises(UserError, match="query cannot be listed"):
            open_data(f"folder:{root}")
    finally:
        closed.chmod(0o700)
        (root / "query").chmod(0o700)


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


# MSMT17

NAMES = {
    "list_train.txt": ["0000/0000_000_01_0303morning_0008_0.jpg 0", "0001/0001_003_14_0303noon_0021_0.jpg 1"],
    "list_val.txt": ["0000/0000_001_05_0303morning_0009_1.jpg 0"],
    "list_query.txt": ["0000/0000_000_02_0303afternoon_0008_0.jpg 0"],
    "list_gallery.txt": ["0000/0000_010_03_0303morning_0008_0.jpg 0", "0001/0001_000_15_0303noon_0008_0.jpg 1"],
}


@pytest.fixture(params=[("train", "test"), ("mask_train_v2", "mask_test_v2"), ("mask_train_V2", "mask_test_V2")])
def msmt17(tmp_path, request):
    root = tmp_path / "MSMT17"
    for name, lines in NAMES.items():
        folder = request.param[0 if name in ("list_train.txt", "list_val.txt") else 1]
        for line in lines:
            path = Path(folder, line.split()[0])
            fill(root, {str(path.parent): [path.name]})
        (root / name).write_text("\n".join(lines) + "\n\n")
    return root


def test_msmt17_is_its_lists_with_identities_from_1(msmt17):
    data = open_data(f"msmt17:{msmt17}", ("train", "query", "gallery"))
    assert [(image.identity, image.camera) for image in data.train] == [(1, 1), (2, 14), (1, 5)]
    assert [(image.identity, image.camera) for image in data.query] == [(1, 2)]
    assert [(image.identity, image.camera) for image in data.gallery] == [(1, 3), (2, 15)]
    assert all(image.path.is_file() for image in (*data.train, *data.query, *data.gallery))
    assert [note.split()[0] for note in data.notes] == ["train", "query", "gallery"]


def test_msmt17_opens_from_the_folder_above_and_from_that_of_its_images(msmt17):
    for place in (msmt17.parent, next(path for path in msmt17.iterdir() if path.is_dir())):
        assert open_data(f"msmt17:{place}").root == msmt17


def test_msmt17s_train_need_not_exist_to_validate(msmt17):
    for name in ("list_train.txt", "list_val.txt"):
        (msmt17 / name).unlink()
    assert open_data(f"msmt17:{msmt17}").train == []
    with pytest.raises(UserError, match=r"list_train\.txt cannot be read"):
        open_data(f"msmt17:{msmt17}", ("train",))


@pytest.mark.parametrize(
    "line",
    ["0000/0000_000_02_0303noon_0008_0.jpg", "0000/0000.jpg 0", "0000/0000_000_xx_0303noon_0008_0.jpg 0", "\xff"],
)
def test_a_malformed_line_is_named_with_its_number(msmt17, line):
    listed = msmt17 / "list_query.txt"
    listed.write_bytes(listed.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"list_query\.txt, line 3: .* is not a file and an identity"):
        open_data(f"msmt17:{msmt17}")


def test_a_listed_image_that_is_missing_is_named(msmt17):
    image = open_data(f"msmt17:{msmt17}").gallery[1].path
    image.unlink()
    with pytest.raises(UserError, match=rf"{image.name} is missing: list_gallery\.txt lists it in line 2"):
        open_data(f"msmt17:{msmt17}")


def test_an_empty_list_is_a_sentence(msmt17):
    (msmt17 / "list_query.txt").write_text("\n")
    with pytest.raises(UserError, match=r"list_query\.txt lists no image"):
        open_data(f"msmt17:{msmt17}")


def test_both_versions_of_msmt17_in_one_folder_are_a_sentence(msmt17):
    for name in ("test", "mask_test_v2"):
        (msmt17 / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"has to hold either test .* or mask_test_v2"):
        open_data(f"msmt17:{msmt17}", ("query",))
