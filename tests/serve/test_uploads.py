"""Uploaded bytes into crops: what is cut, what is refused, and in which words."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hostile import png_bomb
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.serve.limits import Limits
from mgn_deploy.serve.uploads import TooLarge, Upload, check_count, decode, image_hash, parse_boxes, parse_crops

LIMITS = Limits()


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def person() -> Image.Image:
    return draw_crop(1, 1, 0)


def test_a_whole_image_is_what_embed_would_have_read(person: Image.Image) -> None:
    content = encoded(person)
    (crop,) = decode(Upload("a.png", content), 96, 32, LIMITS)
    assert np.array_equal(crop.pixels, read_crop(content, 96, 32))
    assert (crop.name, crop.box, crop.error) == ("a.png", None, None)


def test_a_box_is_the_crop_of_those_pixels(person: Image.Image) -> None:
    upload = Upload("a.png", encoded(person), boxes=((10, 20, 30, 60),))
    (crop,) = decode(upload, 96, 32, LIMITS)
    assert np.array_equal(crop.pixels, read_crop(person.crop((10, 20, 40, 80)), 96, 32))


def test_a_box_is_clipped_at_the_border(person: Image.Image) -> None:
    upload = Upload("a.png", encoded(person), boxes=((-10, -10, 40, 60),))
    (crop,) = decode(upload, 96, 32, LIMITS)
    assert crop.box == (0, 0, 30, 50)


@pytest.mark.parametrize("box", [(5000, 0, 10, 10), (-20, 0, 22, 50), (10, 10, 3, 50)])
def test_a_box_without_pixels_has_a_reason_and_the_others_their_crops(person: Image.Image, box: tuple) -> None:
    bad, good = decode(Upload("a.png", encoded(person), boxes=(box, (0, 0, 20, 40))), 96, 32, LIMITS)
    assert bad.pixels is None
    assert "no 4 pixels" in bad.error
    assert good.pixels is not None


def test_boxes_are_of_the_image_as_it_is_shown(person: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upload = Upload("a.jpg", encoded(person.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif))
    (whole,) = decode(upload, 96, 32, LIMITS)
    assert np.array_equal(whole.pixels, read_crop(person, 96, 32))


def test_what_is_no_image_has_a_reason_for_each_of_its_boxes() -> None:
    first, second = decode(Upload("a.jpg", b"no image", boxes=((0, 0, 5, 5), (1, 1, 5, 5))), 96, 32, LIMITS)
    assert "not an image" in first.error
    assert first.error == second.error


def test_pixels_are_counted_before_any_is_decoded() -> None:
    with pytest.raises(TooLarge, match="40 megapixels"):
        decode(Upload("bomb.png", png_bomb(9000)), 96, 32, LIMITS)


def test_what_pillow_itself_calls_a_bomb_is_too_large() -> None:
    with pytest.raises(TooLarge, match="megapixels"):
        decode(Upload("bomb.png", png_bomb(14000)), 96, 32, LIMITS)


def test_a_jpeg_of_very_many_scans_is_refused(person: Image.Image) -> None:
    content = encoded(person, "JPEG", progressive=True)
    scan = content.rindex(b"\xff\xda")
    with pytest.raises(TooLarge, match="scans"):
        decode(Upload("a.jpg", content[:scan] + content[scan:-2] * 101 + content[-2:]), 96, 32, LIMITS)
    assert decode(Upload("a.jpg", content), 96, 32, LIMITS)[0].error is None


def test_boxes_count_as_images() -> None:
    uploads = [Upload("a", b"", boxes=((0, 0, 1, 1),) * 3), Upload("b", b"")]
    assert check_count(uploads, LIMITS) == 4
    with pytest.raises(TooLarge, match="4 crops"):
        check_count(uploads, Limits(images=3))
    with pytest.raises(UserError, match="no image"):
        check_count([], LIMITS)


@pytest.mark.parametrize(
    "text, images, boxes",
    [
        ("[[1, 2, 3, 4]]", 1, [((1, 2, 3, 4),)]),
        ("[[1, 2, 3, 4], [5, 6, 7.5, 8]]", 1, [((1, 2, 3, 4), (5, 6, 7.5, 8))]),
        ("[[[1, 2, 3, 4]]]", 1, [((1, 2, 3, 4),)]),
        ("[null]", 1, [None]),
        ("[[[1, 2, 3, 4]], null]", 2, [((1, 2, 3, 4),), None]),
    ],
)
def test_boxes_are_a_list_for_one_image_or_one_list_an_image(text: str, images: int, boxes: list) -> None:
    assert parse_boxes(text, images) == boxes


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", "[[1, 2, 3]]", "[[1, 2, 0, 4]]", '[["1", 2, 3, 4]]', "[[1, 2, NaN, 4]]", "[[1, 2, 1e99, 4]]",
     "[[true, 2, 3, 4]]", "[" * 100_000],
)  # fmt: skip
def test_other_boxes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="box"):
        parse_boxes(text, 1)


@given(st.text(max_size=40) | st.recursive(st.none() | st.floats(), st.lists, max_leaves=8).map(str), st.integers(1, 3))
def test_whatever_boxes_are_they_are_boxes_or_refused(text: str, images: int) -> None:
    try:
        found = parse_boxes(text, images)
    except UserError:
        return
    assert len(found) == images
    assert all(one is None or all(len(box) == 4 for box in one) for one in found)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_decoded_crops_come_as_they_were_sent() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (3, 96, 32, 3), np.uint8)
    assert np.array_equal(parse_crops(npy(crops), 96, 32, LIMITS), crops)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        npy(np.zeros((1, 96, 32, 3), np.float32)),
        npy(np.zeros((1, 32, 96, 3), np.uint8)),
        npy(np.zeros((0, 96, 32, 3), np.uint8)),
        npy(np.zeros((96, 32, 3), np.uint8)),
        npy(np.asfortranarray(np.zeros((2, 96, 32, 3), np.uint8))),
        npy(np.zeros((2, 96, 32, 3), np.uint8))[:-1],
        npy(np.zeros((2, 96, 32, 3), np.uint8)) + b"\0",
        npy(np.array([{"an": "object"}], object)),
    ],
    ids=range(10),
)
def test_other_arrays_are_refused(content: bytes) -> None:
    with pytest.raises(UserError):
        parse_crops(content, 96, 32, LIMITS)


def test_too_many_crops_are_too_large() -> None:
    with pytest.raises(TooLarge, match="3 crops"):
        parse_crops(npy(np.zeros((3, 96, 32, 3), np.uint8)), 96, 32, Limits(images=2))


def test_the_same_box_of_the_same_image_has_the_same_hash() -> None:
    upload = Upload("a", b"content")
    assert image_hash(upload, None) == image_hash(Upload("b", b"content"), None)
    assert len({image_hash(upload, None), image_hash(upload, (0, 0, 1, 1)), image_hash(upload, (0, 0, 1, 2))}) == 3
