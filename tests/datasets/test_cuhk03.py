"""CUHK03 by its new protocol: MATLAB files of the published structure, extracted crops, and CUHK03-NP."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from mgn_deploy.datasets import Dataset, open_data
from mgn_deploy.datasets import cuhk03 as module
from mgn_deploy.errors import UserError

ALL = ("train", "query", "gallery")

# Of two camera pairs: the images that a person has, of 10; those up to 5 are view 1.
PEOPLE = [[(1, 2, 6), (1, 7)], [(3, 9, 10)]]
FILES = [
    f"{pair}_{person:03d}_{1 if image <= 5 else 2}_{image:02d}.png"
    for pair, people in enumerate(PEOPLE, 1)
    for person, images in enumerate(people, 1)
    for image in images
]


def crop(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 5 + seed % 3, 3), np.uint8)


def write_raw(path: Path, crops: str = "labeled") -> None:
    """As MATLAB 7.3 writes cells: references, axes in reverse, an empty cell as its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with h5py.File(path, "w") as file:
        pairs = file.create_dataset(crops, (1, len(PEOPLE)), h5py.ref_dtype)
        for pair, people in enumerate(PEOPLE):
            cells = file.create_dataset(f"#refs#/{pair}", (10, len(people)), h5py.ref_dtype)
            pairs[0, pair] = cells.ref
            for person, images in enumerate(people):
                for image in range(10):
                    if image + 1 in images:
                        cell = file.create_dataset(f"#refs#/{pair}-{person}-{image}", data=crop(count).T)
                        count += 1
                    else:
                        cell = file.create_dataset(f"#refs#/{pair}-{person}-{image}", data=np.zeros(2, np.uint64))
                        cell.attrs["MATLAB_empty"] = 1
                    cells[image, person] = cell.ref


def write_config(root: Path, crops: str = "labeled", **changes: object) -> Path:
    files = np.empty((len(FILES), 1), object)
    files[:, 0] = FILES
    content = {
        "filelist": files,
        "labels": np.array([[4], [4], [4], [7], [7], [9], [9], [9]], np.float64),
        "train_idx": np.array([[6], [7], [8]], np.uint16),
        "query_idx": np.array([[1]], np.uint16),  # one element, which MATLAB files keep as a matrix too
        "gallery_idx": np.array([[2], [3], [4], [5]], np.uint16),
        **changes,
    }
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"cuhk03_new_protocol_config_{crops}.mat"
    scipy.io.savemat(path, {key: value for key, value in content.items() if value is not None})
    return path


@pytest.fixture
def root(tmp_path):
    write_raw(tmp_path / "cuhk03" / "cuhk03_release" / "cuhk-03.mat")
    write_config(tmp_path / "cuhk03")
    return tmp_path / "cuhk03"


def rows(data: Dataset) -> list[list[tuple[str, int, int]]]:
    return [[(image.path.name, image.identity, image.camera) for image in data.images(subset)] for subset in ALL]


EXPECTED = [
    [("2_001_1_03.png", 9, 1), ("2_001_2_09.png", 9, 2), ("2_001_2_10.png", 9, 2)],
    [("1_001_1_01.png", 4, 1)],
    [("1_001_1_02.png", 4, 1), ("1_001_2_06.png", 4, 2), ("1_002_1_01.png", 7, 1), ("1_002_2_07.png", 7, 2)],
]


def test_the_split_and_pixels_are_those_of_the_matlab_files(root):
    data = open_data(f"cuhk03-labeled:{root}", ALL)
    assert rows(data) == EXPECTED
    for seed, name in enumerate(FILES):
        assert np.array_equal(np.asarray(Image.open(root / "images_labeled" / name)), crop(seed))
    assert [note.split()[0] for note in data.notes] == list(ALL)


@pytest.mark.parametrize("place", ["..", "cuhk03_release"])
def test_a_place_one_level_off_is_found(root, place):
    assert rows(open_data(f"cuhk03-labeled:{root / place}", ALL)) == EXPECTED


def test_the_raw_file_may_lie_beside_the_split(root):
    (root / "cuhk03_release" / "cuhk-03.mat").rename(root / "cuhk-03.mat")
    assert rows(open_data(f"cuhk03-labeled:{root}", ALL)) == EXPECTED


def test_crops_are_extracted_once_and_then_do_without_the_raw_file(root, said):
    open_data(f"cuhk03-labeled:{root}")
    assert "extracting the labeled crops" in said[0]
    assert said[1] == "8 crops extracted, all"
    (root / "cuhk03_release" / "cuhk-03.mat").unlink()
    assert rows(open_data(f"cuhk03-labeled:{root}", ALL)) == EXPECTED
    assert [sentence for sentence in said if "extract" in sentence] == said[:2]


def test_detected_crops_have_their_own_files(root):
    write_raw(root / "cuhk-03.mat", "detected")
    write_config(root, "detected")
    data = open_data(f"cuhk03-detected:{root}", ALL)
    assert rows(data) == EXPECTED
    assert data.query[0].path.parent == root / "images_detected"
    assert not (root / "images_labeled").exists()


def test_an_interrupted_extraction_leaves_nothing_and_is_done_again(root, monkeypatch):
    whole = module._read_crops

    def interrupted(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_read_crops", interrupted)
    before = sorted(path.name for path in root.iterdir())
    with pytest.raises(KeyboardInterrupt):
        open_data(f"cuhk03-labeled:{root}")
    assert sorted(path.name for path in root.iterdir()) == before
    monkeypatch.undo()
    assert rows(open_data(f"cuhk03-labeled:{root}", ALL)) == EXPECTED


def test_no_raw_file_and_no_crops_are_a_sentence(root):
    (root / "cuhk03_release" / "cuhk-03.mat").unlink()
    with pytest.raises(UserError, match=r"has neither images_labeled nor cuhk-03\.mat"):
        open_data(f"cuhk03-labeled:{root}")


def test_no_split_is_a_sentence_that_says_where_to_get_it(root):
    (root / "cuhk03_new_protocol_config_labeled.mat").unlink()
    with pytest.raises(UserError, match=r"does not hold cuhk03_new_protocol_config_labeled\.mat \(from github"):
        open_data(f"cuhk03-labeled:{root}")


def test_a_crop_that_is_missing_is_named(root):
    open_data(f"cuhk03-labeled:{root}")
    (root / "images_labeled" / "1_002_1_01.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 4 gallery images are not there, .*1_002_1_01\.png the first"):
        open_data(f"cuhk03-labeled:{root}")


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_a_raw_file_that_is_none_is_a_sentence_and_leaves_nothing(root, content):
    raw = root / "cuhk03_release" / "cuhk-03.mat"
    raw.write_bytes(raw.read_bytes()[:3000] if content is None else content)
    with pytest.raises(UserError, match=r"cuhk-03\.mat cannot be read as CUHK03's images"):
        open_data(f"cuhk03-labeled:{root}")
    assert not (root / "images_labeled").exists()


def test_a_raw_file_without_these_crops_is_a_sentence(root):
    write_config(root, "detected")
    with pytest.raises(UserError, match=r"cuhk-03\.mat cannot be read as CUHK03's images .*detected"):
        open_data(f"cuhk03-detected:{root}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": None}, "cannot be read as the new protocol's split .*labels"),
        ({"labels": np.ones((3, 1))}, "has 8 files and 3 labels"),
        ({"labels": np.zeros((8, 1))}, "from 1"),
        ({"query_idx": np.array([[9]])}, "query_idx has to hold numbers from 1 to 8"),
        ({"gallery_idx": np.zeros((0, 0))}, "gallery_idx has to hold numbers"),
        ({"filelist": np.array([["../x.png"]], object)}, r"'\.\./x\.png' in its file list is not like"),
    ],
)
def test_a_malformed_split_is_a_sentence(root, changes, sentence):
    write_config(root, **changes)
    with pytest.raises(UserError, match=rf"config_labeled\.mat.*{sentence}"):
        open_data(f"cuhk03-labeled:{root}")


def test_a_split_that_is_no_matlab_file_is_a_sentence(root):
    (root / "cuhk03_new_protocol_config_labeled.mat").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read as the new protocol's split"):
        open_data(f"cuhk03-labeled:{root}")


@pytest.mark.parametrize("package", ["h5py", "scipy"])
def test_a_package_that_is_missing_is_a_sentence_with_what_to_install(root, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed \(pip install 'mgn-deploy\[train\]'\)"):
        open_data(f"cuhk03-labeled:{root}")


# CUHK03-NP


@pytest.fixture(params=[("labeled", "detected"), ("cuhk-label", "cuhk-detect")])
def market_layout(tmp_path, request):
    for identity, folder in enumerate(request.param, 1):
        for subset in ("query", "bounding_box_test"):
            (tmp_path / folder / subset).mkdir(parents=True)
            (tmp_path / folder / subset / f"{identity:04d}_c1_22.png").touch()
    return tmp_path, request.param


def test_the_two_folders_of_cuhk03_np_are_told_apart(market_layout):
    root, _ = market_layout
    assert open_data(f"cuhk03-labeled:{root}").query[0].identity == 1
    assert open_data(f"cuhk03-detected:{root}").query[0].identity == 2


def test_the_other_folder_of_cuhk03_np_is_not_taken(market_layout):
    root, (labeled, detected) = market_layout
    assert open_data(f"cuhk03-labeled:{root / labeled / 'query'}").root == root / labeled
    with pytest.raises(UserError, match=r"does not hold .* the labeled crops of CUHK03-NP"):
        open_data(f"cuhk03-labeled:{root / detected}")
