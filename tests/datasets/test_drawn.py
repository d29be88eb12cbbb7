"""The drawn people: the same everywhere, told apart, and laid out as Market-1501."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy
import pytest
from PIL import Image

from mgn_deploy.datasets.dataset import DISTRACTOR, JUNK
from mgn_deploy.datasets.drawn import draw_crop, draw_market1501, draw_people
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return draw_market1501(tmp_path_factory.mktemp("drawn") / "people", train_identities=3, test_identities=6)


def test_another_process_draws_the_same_pixels():
    code = (
        "import hashlib; from mgn_deploy.datasets.drawn import draw_crop\n"
        "drawn = b''.join(draw_crop(7, camera, 9, seed=5).tobytes() for camera in range(1, 7))\n"
        "print(hashlib.sha256(drawn).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = hashlib.sha256(b"".join(draw_crop(7, camera, 9, seed=5).tobytes() for camera in range(1, 7))).hexdigest()
    assert here == other


@pytest.mark.parametrize("change", [{"identity": 2}, {"camera": 2}, {"frame": 2}, {"seed": 2}])
def test_every_argument_changes_the_picture(change):
    numbers = {"identity": 1, "camera": 1, "frame": 1, "seed": 1}
    pictures = [draw_crop(**arguments).resize((32, 96)) for arguments in (numbers, numbers | change)]
    first, second = (numpy.asarray(picture, numpy.int16) for picture in pictures)
    assert numpy.abs(first - second).mean() > 4


def test_crops_are_rgb_and_of_a_detectors_sizes():
    sizes = set()
    for identity in range(60):
        crop = draw_crop(identity, 1 + identity % 9, 0)
        assert crop.mode == "RGB"
        assert 46 <= crop.width <= 86
        assert 110 <= crop.height <= 180
        sizes.add(crop.size)
    assert len(sizes) > 30


def test_people_look_different_under_the_same_camera():
    """Two frames of one person are nearer than frames of two people, far more often than by chance."""

    def frame(identity, number):
        pixels = numpy.asarray(draw_crop(identity, 1, number).resize((16, 48)), numpy.float32)
        return (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))

    first, second = ([frame(identity, number) for identity in range(30)] for number in (0, 1))
    nearest = [int(numpy.argmin([((a - b) ** 2).sum() for b in second])) for a in first]
    assert sum(found == identity for identity, found in enumerate(nearest)) > 9  # chance: 1 of 30


def test_the_folder_holds_what_is_reported(dataset):
    market = open_market1501(dataset.root)
    assert (len(market.train), len(market.query), len(market.gallery)) == (
        dataset.train,
        dataset.query,
        dataset.gallery,
    )
    assert len({image.identity for image in market.train}) == dataset.train_identities == 3
    assert len({image.identity for image in market.query}) == dataset.test_identities == 6
    assert sum(image.identity == JUNK for image in market.gallery) == dataset.junk > 0
    assert sum(image.identity == DISTRACTOR for image in market.gallery) == dataset.distractors > 0
    assert not {image.identity for image in market.train} & {image.identity for image in market.query}


def test_every_image_opens_and_redraws_from_its_name(dataset):
    market = open_market1501(dataset.root)
    for image in market.train + market.query + market.gallery:
        with Image.open(image.path) as picture:
            picture.load()
            size = picture.size
        if image.identity not in (JUNK, DISTRACTOR):
            frame = int(image.path.name.split("_")[2])
            assert draw_crop(image.identity, image.camera, frame).size == size


@pytest.mark.parametrize(("cameras", "images_per_camera"), [(2, 1), (2, 2), (3, 1), (5, 2), (9, 1)])
def test_every_query_has_a_true_match_in_another_camera(tmp_path, cameras, images_per_camera):
    draw_market1501(
        tmp_path / "people",
        train_identities=1,
        test_identities=4,
        cameras=cameras,
        images_per_camera=images_per_camera,
    )
    market = open_market1501(tmp_path / "people")
    for query in market.query:
        matches = {image.camera for image in market.gallery if image.identity == query.identity}
        assert matches - {query.camera}


def test_a_folder_with_files_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        draw_market1501(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_drawing_leaves_nothing(tmp_path):
    def interrupt(step, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_market1501(tmp_path / "people", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_image(tmp_path):
    (tmp_path / "empty").mkdir()
    calls = []
    drawn = draw_market1501(
        tmp_path / "empty", train_identities=2, test_identities=3, progress=lambda step, *call: calls.append(call)
    )
    total = drawn.train + drawn.query + drawn.gallery
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_identities": 0},
        {"test_identities": 9999},
        {"cameras": 1},
        {"images_per_camera": 0},
        {"seed": -1},
    ],
)
def test_counts_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(UserError):
        draw_market1501(tmp_path / "people", **wrong)


def test_people_in_memory_are_reproducible_crops_of_several_people():
    people = draw_people(12, seed=3)
    assert len(people) == 12
    assert all(person.dtype == numpy.uint8 and person.ndim == 3 and person.shape[2] == 3 for person in people)
    assert all((a == b).all() for a, b in zip(people, draw_people(12, seed=3), strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(people, draw_people(12, seed=4), strict=True))
