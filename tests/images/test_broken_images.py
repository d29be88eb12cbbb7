"""Every broken file has its reason, and none is a crash."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from encoded import COLOURS, crop_bytes, encoded, reason
from hostile import png_bomb
from PIL import Image

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.decode import load_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest resets the filter that images.py sets


def outcome(source: object) -> Image.Image | str:
    """The pixels, or the reason why there are none."""
    try:
        return load_rgb(source)
    except UnreadableImage as refused:
        return str(refused)


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
