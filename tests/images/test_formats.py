"""Every format to pixels as the eye sees it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from encoded import COLOURS, crop_bytes, encoded, reason
from PIL import Image, ImageCms

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.images.decode import load_rgb, read_crop

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest resets the filter that images.py sets


# Every format, as the eye sees it


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_same_pixels(kind, options):
    assert np.array_equal(np.asarray(load_rgb(encoded(Image.fromarray(COLOURS), kind, **options))), COLOURS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_jpeg_is_near_the_original(options):
    pixels = np.asarray(load_rgb(encoded(Image.fromarray(COLOURS), "JPEG", quality=95, **options)))
    assert np.abs(pixels.astype(int) - COLOURS)[4:28, 4:28].max() < 6


def test_cmyk_jpeg_is_not_inverted():
    cmyk = Image.fromarray(COLOURS).convert("CMYK")
    pixels = np.asarray(load_rgb(encoded(cmyk, "JPEG", quality=95)))
    assert np.abs(pixels.astype(int) - COLOURS)[4:28, 4:28].max() < 6


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255, 7])])
def test_palette_png_gives_the_palette_colours(transparency):
    palette = Image.fromarray(COLOURS).quantize(4)
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(np.asarray(load_rgb(encoded(palette, "PNG", **options))), np.asarray(palette.convert("RGB")))
    assert np.asarray(palette.convert("RGB"))[5, 5].tolist() == COLOURS[5, 5].tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_grey(kind):
    grey = np.repeat(np.array([[0, 257 * 40, 257 * 128, 65535]], np.uint16), 8, axis=0).repeat(4, axis=1)
    pixels = np.asarray(load_rgb(encoded(Image.fromarray(grey), kind)))
    assert pixels[3, ::4].tolist() == [[value] * 3 for value in (0, 40, 128, 255)]


def test_big_endian_sixteen_bit_tiff_keeps_its_grey():
    values = np.full((8, 8), 257 * 40, ">u2")
    tags = [
        (256, 3, 8),
        (257, 3, 8),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 8),
        (279, 4, 128),
    ]
    directory = struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack(">HHI", tag, kind, 1) + (
            struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
        )
    content = b"MM\x00*" + struct.pack(">I", 8 + 128) + values.tobytes() + directory + bytes(4)
    assert np.unique(np.asarray(load_rgb(content))).tolist() == [40]


def test_alpha_is_dropped():
    alpha = Image.fromarray(np.full((64, 64), 10, np.uint8))
    rgba = Image.fromarray(COLOURS)
    rgba.putalpha(alpha)
    assert np.array_equal(np.asarray(load_rgb(encoded(rgba, "PNG"))), COLOURS)
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    grey.putalpha(alpha.resize((8, 8)))
    assert np.unique(np.asarray(load_rgb(encoded(grey, "PNG")))).tolist() == [77]


def test_one_bit_image_is_black_and_white():
    pixels = np.asarray(load_rgb(encoded(Image.fromarray(COLOURS[:, :, 0] > 128), "PNG")))
    assert pixels[5, 5].tolist() == [255] * 3
    assert pixels[40, 5].tolist() == [0] * 3


def test_float_image_is_refused():
    assert "32-bit floats" in reason(encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(kind, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(load_rgb(encoded(Image.fromarray(COLOURS[:, :48]), kind, exif=exif.tobytes())))
    turned = np.rot90(COLOURS[:, :48], turn)
    assert pixels.shape == turned.shape
    assert np.median(np.abs(pixels.astype(int) - turned)) < 6


@pytest.mark.parametrize("kind", ["ICO", "PCX"])
def test_unlisted_format_named_jpg_is_refused(kind):
    assert reason(crop_bytes(kind)).startswith("not an image (its content is none of jpeg, png, bmp, dib, webp, ppm")


@pytest.mark.parametrize("high", [255, 65535])
def test_32_bit_integers_are_taken_by_the_range_of_their_values(high):
    grey = np.linspace(0, high, 64 * 32).astype(np.int32).reshape(64, 32)
    pixels = np.asarray(load_rgb(encoded(Image.fromarray(grey), "TIFF")))[..., 0]
    assert np.abs(pixels - grey * (255 / high)).max() <= 0.5


@pytest.mark.parametrize("low, high", [(-1, 255), (0, 65536)])
def test_32_bit_integers_of_unknown_range_are_refused(low, high):
    grey = np.linspace(low, high, 64 * 32).astype(np.int32).reshape(64, 32)
    assert reason(encoded(Image.fromarray(grey), "TIFF")) == (
        f"pixels are 32-bit integers from {low} to {high}: save it as 8- or 16-bit"
    )


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame_of_an_animation_counts(kind):
    frames = [Image.new("RGB", (16, 32), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    pixels = np.asarray(load_rgb(encoded(frames[0], kind, save_all=True, append_images=frames[1:])))
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - (200, 0, 0)).max() < 6


def test_colour_profile_and_large_metadata_do_not_matter():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(load_rgb(crop_bytes("JPEG")))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    assert np.array_equal(np.asarray(load_rgb(crop_bytes("JPEG", icc_profile=profile, exif=exif.tobytes()))), plain)


def test_garbage_behind_a_jpeg_does_not_matter():
    content = crop_bytes("JPEG")
    assert np.array_equal(np.asarray(load_rgb(content + b"\x00garbage" * 1000)), np.asarray(load_rgb(content)))


# The crop


def test_crop_has_the_networks_size_and_type():
    crop = read_crop(crop_bytes("PNG"), 96, 32)
    assert crop.shape == (96, 32, 3)
    assert crop.dtype == np.uint8


def test_image_of_the_networks_size_is_not_resampled():
    assert np.array_equal(read_crop(encoded(Image.fromarray(COLOURS), "PNG"), 64, 64), COLOURS)


def test_image_opened_by_pil_is_read_like_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_crop(1, 1, 0).save(tmp_path / "turned.jpg", exif=exif.tobytes())
    Image.fromarray(np.full((9, 9), 257 * 40, np.uint16)).save(tmp_path / "grey.png")
    for name in ("turned.jpg", "grey.png"):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(read_crop(image, 96, 32), read_crop(tmp_path / name, 96, 32)), name
