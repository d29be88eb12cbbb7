"""A broken file is found by its header and its end, and told with the words of the decoder."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images import check
from mgn_deploy.images.check import ImageFacts, check_image
from mgn_deploy.images.decode import load_rgb


def picture(path: Path, **options) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm"])
def test_a_whole_file_has_its_size_and_hash(tmp_path, name):
    path = picture(tmp_path / name)
    assert check_image(path) == ImageFacts(path.stat().st_size, zlib.crc32(path.read_bytes()))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_whole_file_of_the_common_kinds_is_not_decoded(tmp_path, name, monkeypatch):
    path = picture(tmp_path / name)
    monkeypatch.setattr(check, "load_rgb", lambda path: pytest.fail("it was decoded"))
    check_image(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.97])
def test_a_truncated_file_is_found(tmp_path, name, share):
    path = picture(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UnreadableImage) as expected:
        load_rgb(path)
    with pytest.raises(UnreadableImage, match="^" + str(expected.value).replace("(", r"\(").replace(")", r"\)")):
        check_image(path)


def test_bytes_behind_the_end_of_a_jpeg_are_no_damage(tmp_path):
    path = picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    check_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff\xd8\xff\xd9"])
def test_what_is_no_image_is_found(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage):
        check_image(tmp_path / "a.jpg")


def test_too_small_an_image_is_found(tmp_path):
    Image.new("RGB", (3, 40)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="too small for a person's crop"):
        check_image(tmp_path / "a.png")


def test_what_is_no_file_is_found_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", tmp_path, tmp_path / "none.jpg"):
        with pytest.raises(UnreadableImage):
            check_image(path)


def test_another_content_of_one_size_has_another_hash(tmp_path):
    path = picture(tmp_path / "a.bmp")
    before = check_image(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert check_image(path).size == before.size
    assert check_image(path).crc != before.crc
