"""Arrays, paths and PIL images to embeddings, and what is no image."""

from __future__ import annotations

import io

import numpy as np
import pytest
from embedding_runs import refusal
from PIL import Image

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError


def test_arrays_paths_and_pil_images_agree(images, embedder):
    paths = sorted(images.iterdir())
    turned = Image.Exif()
    turned[0x0112] = 6
    draw_crop(9, 1, 0).save(images / "turned.jpg", exif=turned.tobytes())
    Image.fromarray(np.tile(np.arange(0, 60000, 1000, dtype=np.uint16), (90, 1))).save(images / "grey.png")
    by_path = embedder.embed(paths)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    assert np.abs(embedder.embed(arrays) - by_path).max() < 1e-6
    assert np.abs(embedder.embed([str(path) for path in paths]) - by_path).max() < 1e-6
    assert np.abs(embedder.embed([array[:, ::-1][:, ::-1] for array in arrays]) - by_path).max() < 1e-6
    paths += [images / "turned.jpg", images / "grey.png"]
    assert np.abs(embedder.embed([Image.open(path) for path in paths]) - embedder.embed(paths)).max() < 1e-6
    same_size = np.stack([np.asarray(Image.open(path).resize((50, 100))) for path in paths[:6]])
    assert np.abs(embedder.embed(same_size) - embedder.embed(list(same_size))).max() < 1e-6
    assert embedder.embed([]).shape == (0, embedder.dim)


@pytest.mark.parametrize(
    "source, expected",
    [
        (np.zeros((90, 30, 3), np.float32), "uint8 RGB [height, width, 3], not float32 [90, 30, 3]"),
        (np.zeros((90, 30), np.uint8), "not uint8 [90, 30]"),
        (np.zeros((90, 30, 4), np.uint8), "not uint8 [90, 30, 4]"),
        (np.zeros((3, 90, 30), np.uint8), "not uint8 [3, 90, 30]"),
        (np.zeros((0, 30, 3), np.uint8), "not uint8 [0, 30, 3]"),
        (np.zeros((1, 1, 3), np.uint8), "an image cannot be embedded: 1x1 pixels is too small"),
        (Image.new("F", (30, 90)), "an image cannot be embedded: pixels are 32-bit floats"),
        (None, "an image is a path, a PIL image or a uint8 array, not a NoneType"),
        (0, "not a int"),
        (b"a.jpg", "not a bytes"),
        ("no/such.jpg", "'no/such.jpg' cannot be embedded: No such file or directory"),
        (".", "'.' cannot be embedded: not a regular file"),
    ],
)
def test_what_is_no_image_gets_a_sentence(embedder, source, expected):
    assert expected in refusal(UserError, embedder.embed, [source])


def test_one_image_without_a_list_gets_a_sentence(embedder):
    assert "embed takes a list of images" in refusal(UserError, embedder.embed, "a.jpg")
    assert "not uint8 [30, 3]" in refusal(UserError, embedder.embed, np.zeros((90, 30, 3), np.uint8))


def test_truncated_image_opened_by_pil_gets_a_sentence(images, embedder):
    content = (images / "a.jpg").read_bytes()
    half = Image.open(io.BytesIO(content[: len(content) // 2]))
    assert "an image cannot be embedded: image file is truncated" in refusal(UserError, embedder.embed, [half])
