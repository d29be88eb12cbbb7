"""Decoding writes nothing of its own, never waits, and holds no more pixels than the limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import pytest
from encoded import COLOURS, encoded, reason
from hostile import png_bomb
from PIL import Image

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images import memory
from mgn_deploy.images.decode import load_rgb, open_rgb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest resets the filter that images.py sets


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
