"""Resized pixels are those of Pillow 10 to 12 in every release of Pillow."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.resize import resized

# What `image.resize(size, BICUBIC, box)` gave in Pillow 10.4, 11.3, 12.0 and 12.2.
CASES = [
    ((128, 384), None, "d0d4ba1aa8b85f13"),
    ((64, 160), None, "661f3ae124a97421"),
    ((32, 96), None, "9171ad180e9f01fc"),
    ((64, 30), (3.5, 10, 50, 180.25), "4cdad349fb833208"),
]


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 59, 3), dtype=np.uint8))


def digest(pixels: Image.Image | np.ndarray) -> str:
    return hashlib.sha256(np.asarray(pixels).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("size, box, known", CASES)
def test_pixels_do_not_depend_on_pillows_release(image, size, box, known):
    assert digest(resized(image, size, Image.Resampling.BICUBIC, box)) == known


def test_a_crop_is_resized_so(image):
    assert digest(read_crop(image, 160, 64)) == CASES[1][2]
