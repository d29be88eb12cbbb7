"""The one way an image file becomes the pixels that a network sees.

Training, the PyTorch reference and every backend go through `read_crop`, so nobody can differ in resizing, colour
order or in how an odd file is read. Scaling, mean and standard deviation are inside the network's graph.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

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

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "MPO")


def load_rgb(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Decode an image file (or its bytes) to an RGB `PIL.Image`.

    Grey, palette, CMYK and 16-bit images are converted, an alpha channel is dropped (as the public re-ID trainers do),
    EXIF rotation is applied.

    Raises:
        UnreadableImage: not an image, truncated, empty, smaller than 4 pixels or larger than 64 megapixels, no permission.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked below, and of harmless metadata
            if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
                raise UnreadableImage("not a regular file")  # opening a named pipe would wait forever
            file = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
            with file, Image.open(file, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(f"{width}x{height} pixels is more than the limit of {MAX_PIXELS // 10**6} megapixels")
                if min(width, height) < MIN_SIDE:
                    raise UnreadableImage(f"{width}x{height} pixels is too small for a person's crop")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_not_an_image(source)) from None
    except OSError as error:
        # Pillow reports broken files as OSError without an errno; the system's own have one.
        raise UnreadableImage(error.strerror or str(error) or type(error).__name__) from error
    except (Image.DecompressionBombError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError) as error:
        # What Pillow's parsers are known to raise on broken files.
        raise UnreadableImage(f"broken image ({type(error).__name__}: {error})") from error


def read_crop(source: str | os.PathLike[str] | bytes | Image.Image, height: int, width: int) -> np.ndarray:
    """The crop as the network takes it: RGB uint8 `[height, width, 3]`, resized by Pillow's antialiased bicubic filter.

    Raises:
        UnreadableImage: see `load_rgb`.
    """
    image = source if isinstance(source, Image.Image) else load_rgb(source)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


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


def _not_an_image(source: str | os.PathLike[str] | bytes) -> str:
    size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    if size == 0:
        return "the file is empty"
    return "not an image (its content is none of " + ", ".join(f.lower() for f in _FORMATS[:-1]) + ")"
