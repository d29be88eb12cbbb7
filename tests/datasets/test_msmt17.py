"""MSMT17: its lists, its two versions, and lines that are malformed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_datasets import fill

from mgn_deploy.datasets import open_data
from mgn_deploy.errors import UserError

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
