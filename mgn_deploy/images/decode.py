"""The one way an image file becomes the pixels that a network sees.

Training, the PyTorch reference and every backend go through `read_crop`, so nobody can differ in resizing, colour
order or in how an odd file is read. Scaling, mean and standard deviation are inside the network's graph.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import BinaryIO, TypeVar

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mgn_deploy.errors import UnreadableImage
from mgn_deploy.images.formats import HEIF_HINT, content_format, readable_formats
from mgn_deploy.images.memory import decoding, silence_libtiff
from mgn_deploy.images.resize import resized

# Part of a store's identity: embeddings made by different pixel paths must not be mixed. Change it with the code below.
# Pillow-SIMD, which replaces Pillow under its name, resizes to other pixels.
PREPROCESSING = "pillow-simd-bicubic-1" if ".post" in PIL.__version__ else "pillow-bicubic-1"

# A crop of a person is small. The limit is checked on the header, before any pixel is decoded (a PNG of 400 megapixels
# can be 50 KB on disk and 1.2 GB in memory).
MAX_PIXELS = 64_000_000
MIN_SIDE = 4

T = TypeVar("T")

# Pillow warns of what is checked below and of harmless metadata. Set once: `catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module="PIL")
# What Pillow logs names no file, and what it raises does: without a handler of the program's own it is not printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Pillow's own blocks are of 16 MiB. Of what is smaller than 32 MiB glibc may keep for a thread what it frees: sixteen
# threads that decoded a large image each, one after the other, ended with the memory of all of them.
Image.core.set_block_size(64 << 20)

_TO_8_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # round(value / 257): 16-bit white is 255


def load_rgb(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Decode an image file (or its bytes, or what PIL opened) to an RGB `PIL.Image`.

    Grey, palette, CMYK and 16-bit images are converted, an alpha channel is dropped (as the public re-ID trainers do),
    EXIF rotation is applied. Of an animation the first frame counts.

    Raises:
        UnreadableImage: not an image, truncated, empty, below 4 pixels a side or above 64 megapixels, no permission.
    """
    with open_rgb(source) as image:
        return image


@contextmanager
def open_rgb(source: str | os.PathLike[str] | bytes | Image.Image) -> Iterator[Image.Image]:
    """What `load_rgb` gives, within the memory that all threads together may take for pixels.

    Raises:
        UnreadableImage: see `load_rgb`.
    """
    with ExitStack() as held:
        yield _read(source, partial(_checked_rgb, held))


def upright_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """The width and height that `load_rgb` gives an image file, by its header.

    Raises:
        UnreadableImage: not an image, empty, no permission.
    """
    return _read(source, _upright_size)


def read_crop(source: str | os.PathLike[str] | bytes | Image.Image, height: int, width: int) -> np.ndarray:
    """Read the crop as the network takes it: RGB uint8 `[height, width, 3]`.

    It is resized by Pillow's antialiased bicubic filter.

    Raises:
        UnreadableImage: see `load_rgb`.
    """
    with open_rgb(source) as image:
        return resize_crop(image, height, width)


def resize_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize an RGB image to uint8 `[height, width, 3]` by Pillow's antialiased bicubic filter."""
    if image.size != (width, height):
        image = resized(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _read(source: str | os.PathLike[str] | bytes | Image.Image, use: Callable[[Image.Image], T]) -> T:
    """What `use` gives of an opened image; whatever is raised on the way is an UnreadableImage."""
    try:
        if isinstance(source, Image.Image):
            return use(source)
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UnreadableImage("not a regular file")  # opening a named pipe would wait forever
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        with file, _open(file) as image:
            return use(image)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit is higher than ours, and checked earlier
        raise UnreadableImage(f"more than the limit of {MAX_PIXELS // 10**6} megapixels") from None
    except OSError as error:
        # Pillow reports broken files as OSError without an errno; the system's own have one.
        raise UnreadableImage(error.strerror or str(error) or type(error).__name__) from error
    except Exception as error:
        # Pillow's parsers let through whatever a broken file leads them to: SyntaxError, struct.error, zlib.error, ...
        raise UnreadableImage(f"broken image ({type(error).__name__}: {error})") from error


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=readable_formats())
    except UnidentifiedImageError:
        if file.seek(0, os.SEEK_END) == 0:
            raise UnreadableImage("the file is empty") from None
        file.seek(0)
        if content_format(file.read(32)) == "HEIF" and "HEIF" not in readable_formats():
            raise UnreadableImage(f"a HEIC image: {HEIF_HINT}") from None
        known = ", ".join(readable_formats()).lower()
        raise UnreadableImage(f"not an image (its content is none of {known})") from None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(ExifTags.Base.Orientation, 1) > 4 else (width, height)


def _checked_rgb(held: ExitStack, image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels is more than the limit of {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{width}x{height} pixels is too small for a person's crop")
    if image.format == "TIFF":
        silence_libtiff()
    held.enter_context(decoding(width * height))
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image), wide=image.format == "TIFF" and image.mode == "I")


def _to_rgb(image: Image.Image, wide: bool) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnreadableImage("pixels are 32-bit floats of unknown range: save it as 8- or 16-bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 and gives a white image.
        return Image.fromarray(_eight_bits(np.asarray(image), wide)).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, wide: bool) -> np.ndarray:
    """Grey of 16 bits as uint8; `wide`: of 32, whose range no header tells, so that the values have to."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImage(f"pixels are 32-bit integers from {low} to {high}: save it as 8- or 16-bit")
    return values.astype(np.uint8) if wide and high <= 255 else np.take(_TO_8_BIT, values)
