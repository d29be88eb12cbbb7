"""The one way an image file becomes the pixels that a network sees.

Training, the PyTorch reference and every backend go through `read_crop`, so nobody can differ in resizing, colour
order or in how an odd file is read. Scaling, mean and standard deviation are inside the network's graph.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mgn_deploy.errors import UnreadableImage

# Part of a store's identity: embeddings made by different pixel paths must not be mixed. Change it with the code below.
PREPROCESSING = "pillow-bicubic-1"

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
# A crop of a person is small. The limit is checked on the header, before any pixel is decoded (a PNG of 400 megapixels
# can be 50 KB on disk and 1.2 GB in memory).
MAX_PIXELS = 64_000_000
MIN_SIDE = 4

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")  # JPEG is also what Pillow calls MPO

# Pillow warns of what is checked below and of harmless metadata. Set once: `catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module="PIL")


def load_rgb(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Decode an image file (or its bytes, or what PIL opened) to an RGB `PIL.Image`.

    Grey, palette, CMYK and 16-bit images are converted, an alpha channel is dropped (as the public re-ID trainers do),
    EXIF rotation is applied. Of an animation the first frame counts.

    Raises:
        UnreadableImage: not an image, truncated, empty, below 4 pixels a side or above 64 megapixels, no permission.
    """
    try:
        if isinstance(source, Image.Image):
            return _checked_rgb(source)
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UnreadableImage("not a regular file")  # opening a named pipe would wait forever
        file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115
        with file, _open(file) as image:
            return _checked_rgb(image)
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


def read_crop(source: str | os.PathLike[str] | bytes | Image.Image, height: int, width: int) -> np.ndarray:
    """Read the crop as the network takes it: RGB uint8 `[height, width, 3]`.

    It is resized by Pillow's antialiased bicubic filter.

    Raises:
        UnreadableImage: see `load_rgb`.
    """
    image = load_rgb(source)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        if file.seek(0, os.SEEK_END) == 0:
            raise UnreadableImage("the file is empty") from None
        raise UnreadableImage(f"not an image (its content is none of {', '.join(_FORMATS).lower()})") from None


def _checked_rgb(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels is more than the limit of {MAX_PIXELS // 10**6} megapixels")
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{width}x{height} pixels is too small for a person's crop")
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnreadableImage("pixels are 32-bit floats of unknown range: save it as 8- or 16-bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey: Pillow's own conversion clips at 255 and gives a white image.
        values = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
