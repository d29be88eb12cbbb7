"""Whether a file will be read as an image: by its header and its end, where these two settle it."""

from __future__ import annotations

import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mgn_deploy.images.decode import MAX_PIXELS, MIN_SIDE, load_rgb

HEAD_BYTES = 64 << 10  # crops of people are smaller
# The last bytes of a whole file. A file without them may still be whole: the decoder tells.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class ImageFacts:
    """A file's `size` in bytes, and `crc`, the CRC-32 of its first `HEAD_BYTES`."""

    size: int
    crc: int


def check_image(path: Path) -> ImageFacts:
    """Read the header and the end of an image file; decode it only where they don't tell that it is whole.

    Damage between the two is not noticed.

    Raises:
        UnreadableImage: as `load_rgb`.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # opening a named pipe would wait forever
        with open(path if regular else os.devnull, "rb") as file:
            head = file.read(HEAD_BYTES)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 16))
            end = file.read()
        sound = _is_sound(head, end)
    except OSError:
        sound, size, head = False, 0, b""
    if not sound:
        load_rgb(path)
    return ImageFacts(size, zlib.crc32(head))


def _is_sound(head: bytes, end: bytes) -> bool:
    """Tell whether header and end are those of a JPEG or PNG that surely is read; of others, only decoding tells."""
    try:
        with Image.open(io.BytesIO(head)) as image:
            width, height = image.size
            fits = min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS
            return fits and end.endswith(_ENDS.get(image.format or "", b"never"))
    except Exception:  # Pillow's parsers raise anything on a broken header: the decoder says what it is
        return False
