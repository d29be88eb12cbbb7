"""From file to pixels: every format as the eye sees it, every broken file with a reason, never a wait or a crash."""

import io
import os
import random
import struct
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np
import pytest
from hostile import png_bomb
from PIL import Image, ImageCms

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images import memory
from mgn_deploy.images.decode import load_rgb, open_rgb, read_crop

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest resets the filter that images.py sets

COLOURS = np.kron(
    np.array([[[220, 30, 40], [30, 200, 50]], [[40, 60, 210], [240, 240, 240]]], np.uint8),
    np.ones((32, 32, 1), np.uint8),
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def crop_bytes(kind: str, **options: object) -> bytes:
    return encoded(draw_crop(1, 1, 0), kind, **options)


def outcome(source: object) -> Image.Image | str:
    """The pixels, or the reason why there are none."""
    try:
        return load_rgb(source)
    except UnreadableImage as refused:
        return str(refused)


def reason(source: object) -> str:
    with pytest.raises(UnreadableImage) as refused:
        load_rgb(source)
    return str(refused.value)


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


def test_pillow_logs_nothing_on_a_programs_stderr(tmp_path):
    """In a process of its own: here pytest's handler takes what is logged."""
    content = encoded(Image.fromarray(COLOURS), "TIFF")
    entry = bytes.fromhex("1501 0300 01000000")  # samples per pixel, one 16-bit number
    (tmp_path / "a.tif").write_bytes(content.replace(entry + b"\3\0", entry + b"\xff\xff"))
    script = (
        "import sys\nfrom mgn_deploy.images.decode import load_rgb\n"
        "try: load_rgb(sys.argv[1])\nexcept Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.tif"], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the library that Pillow loaded is not found")
def test_libtiff_prints_nothing_of_its_own(capfd):
    content = bytearray(encoded(Image.fromarray(COLOURS), "TIFF", compression="tiff_lzw"))
    for at in range(8, len(content), 40):
        broken = bytearray(content)
        broken[at] ^= 0xFF
        with suppress(UnreadableImage):
            load_rgb(bytes(broken))
    assert capfd.readouterr().err == ""


def test_threads_decode_no_more_pixels_at_once_than_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT_BYTES", 2 * 80 * 80 * 8)
    begun, most = [], []

    def decode(_):
        with memory.decoding(80 * 80):
            begun.append(1)
            most.append(len(begun))
            time.sleep(0.01)
            begun.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(16)))
    assert max(most) == 2


def test_a_thread_keeps_no_memory_of_a_large_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png_bomb(7000))  # 187 MiB as RGB
    script = (
        "import resource, sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from mgn_deploy.images.decode import read_crop\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with ThreadPoolExecutor(6) as pool: list(pool.map(lambda _: read_crop(sys.argv[1], 96, 32), range(6)))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.png"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 512


def test_pixels_count_until_they_are_resized(monkeypatch):
    content = encoded(Image.fromarray(COLOURS), "PNG")
    monkeypatch.setattr(memory, "LIMIT_BYTES", 1)
    with ThreadPoolExecutor(1) as pool:
        with open_rgb(content):
            other = pool.submit(load_rgb, content)
            assert not wait([other], timeout=0.2).done
        assert other.result().size == COLOURS.shape[1::-1]


def test_image_above_the_limit_is_decoded_alone(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT_BYTES", 1)
    assert load_rgb(encoded(Image.fromarray(COLOURS), "PNG")).size == COLOURS.shape[1::-1]


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


# Every broken file has its reason


def test_empty_file_says_so(tmp_path):
    path = tmp_path / "a.jpg"
    path.touch()
    assert reason(path) == reason(b"") == "the file is empty"


def test_text_named_jpg_says_so(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("I am a letter, not a picture.\n")
    assert reason(path).startswith("not an image")


@pytest.mark.parametrize(
    "kind, options",
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {})],
)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file_is_refused(kind, options, share):
    content = crop_bytes(kind, **options)
    cut = content[: int(len(content) * share)]
    # TIFF and PNG end with metadata: the pixels may be whole. Then they must be right.
    found = outcome(cut)
    if isinstance(found, str):
        assert found
    else:
        assert np.array_equal(np.asarray(found), np.asarray(load_rgb(content)))
        assert share == 0.99


def test_every_cut_of_a_small_jpeg_and_png_is_refused_or_whole():
    for kind in ("JPEG", "PNG"):
        content = encoded(Image.fromarray(COLOURS), kind)
        whole = np.asarray(load_rgb(content))
        refused = 0
        for length in range(len(content)):
            try:
                assert np.array_equal(np.asarray(load_rgb(content[:length])), whole), (kind, length)
            except UnreadableImage:
                refused += 1
        assert refused > 0.9 * len(content) - 24, kind


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3)])
def test_too_small_image_is_refused(size):
    assert (
        reason(encoded(Image.new("RGB", size), "PNG")) == f"{size[0]}x{size[1]} pixels is too small for a person's crop"
    )


def test_four_by_four_is_enough():
    assert load_rgb(encoded(Image.new("RGB", (4, 4)), "PNG")).size == (4, 4)


def test_image_just_over_the_limit_is_refused():
    assert reason(png_bomb(8001)) == "8001x8001 pixels is more than the limit of 64 megapixels"


def test_png_bomb_is_refused_from_its_header(tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb(20_000))
    assert bomb.stat().st_size < 3_000_000
    script = (
        "import resource, sys, time\n"
        "from mgn_deploy.errors import UnreadableImage\n"
        "from mgn_deploy.images.decode import load_rgb\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.process_time()\n"
        "try: load_rgb(sys.argv[1])\n"
        "except UnreadableImage as error: print(error)\n"
        "print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, bomb], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    seconds, kilobytes = map(float, output[1].split())
    assert output[0] == "more than the limit of 64 megapixels"
    assert seconds < 1
    assert kilobytes < 50_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_header_that_lies_about_its_size_is_refused(kind):
    content = bytearray(crop_bytes(kind))
    at = 16 if kind == "PNG" else content.index(b"\xff\xc0") + 5
    content[at : at + 2] = b"\xff\xff"
    assert reason(bytes(content))


def test_random_damage_never_raises_anything_else():
    """Two thousand damaged files: pixels or a reason."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 200
    small = Image.fromarray(COLOURS)
    whole = [
        encoded(small, kind, **options)
        for kind, options in (
            ("JPEG", {"exif": exif.tobytes()}),
            ("JPEG", {"progressive": True}),
            ("PNG", {"exif": exif.tobytes()}),
            ("BMP", {}),
            ("WEBP", {"exif": exif.tobytes()}),
            ("PPM", {}),
            ("TIFF", {"exif": exif.tobytes()}),
            ("MPO", {"save_all": True, "append_images": [small]}),
        )
    ]
    rng = random.Random(3)
    outcomes = [0, 0]
    for _ in range(2000):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.choice((1, 2, 5, 20))):
            content[rng.randrange(min(len(content), rng.choice((64, 400, len(content)))))] = rng.choice(
                (0, 255, rng.randrange(256))
            )
        found = outcome(bytes(content))
        assert found
        outcomes[isinstance(found, str)] += 1
    assert min(outcomes) > 200


def test_exif_that_pillow_chokes_on_is_a_reason_and_no_crash():
    """An orientation tag of a type that Pillow cannot write back raises struct.error, which is no ValueError."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 30
    content = crop_bytes("JPEG", exif=exif.tobytes())
    at = content.index(b"Exif\x00\x00") + 6
    for offset in range(at, at + 40):
        for value in (0, 1, 5, 10, 12, 255):
            damaged = content[:offset] + bytes([value]) + content[offset + 1 :]
            assert outcome(damaged)


# Odd things in a file's place


def test_missing_file_folder_and_device_have_reasons(tmp_path):
    assert reason(tmp_path / "none.jpg") == "No such file or directory"
    assert reason(tmp_path) == "not a regular file"
    assert reason("/dev/zero") == "not a regular file"
    assert reason(tmp_path / ("n" * 256)) == "File name too long"
    assert "null byte" in reason("a\0b.jpg")


def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    start = time.monotonic()
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert time.monotonic() - start < 1


def test_decoding_in_threads_leaves_the_warning_filters_as_they_were():
    """`warnings.catch_warnings` in threads leaves `ignore` behind for the whole process."""
    content = encoded(Image.fromarray(COLOURS), "JPEG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_rgb, [content] * 600))
    assert warnings.filters == before


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
