"""Which files are images: one rule for every command, by a known extension or else by the first bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

from PIL import features

# A file with one of these extensions is an image; whether it can be decoded is found out when it is read.
EXTENSIONS = frozenset(
    f".{name}"
    for name in "jpg jpeg jpe jfif png bmp dib webp ppm pgm pbm pnm tif tiff gif avif heic heif".split()  # noqa: SIM905
)
HEIF_HINT = "mgn-deploy[heif] reads them"
AVIF_HINT = "Pillow 11.3 or later reads them"
NO_EXTENSION = "without extension"
MACOS = "of macOS's metadata"
TAR = ".tar (give 'FOLDER/*.tar' to read them)"

HEAD_BYTES = 32
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}  # sizes of the header that follows: "BM" alone is also text


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that this machine decodes. MPO, which cameras write as .jpg, is JPEG to Pillow."""
    formats = ["JPEG", "PNG", "BMP", "DIB", "WEBP", "PPM", "TIFF", "GIF"]
    if "avif" in features.modules and features.check_module("avif"):
        formats.append("AVIF")
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
        formats.append("HEIF")
    return tuple(formats)


def content_format(head: bytes) -> str | None:
    """The image format that a file's first 32 bytes tell, by Pillow's name; None: no image."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if (
        head[:1] == b"P"
        and head[1:2] in b"123456"
        and head[2:3].isspace()
        and (head[3:4].isdigit() or head[3:4] == b"#")
    ):
        return "PPM"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else None
    return None


def why_not_listed(path: str, name: str) -> str | None:
    """Why a file is passed over, as `skipped_sentence` counts it: its extension, or more; None: it is an image."""
    try:
        return why_no_image(name, lambda: _head(path))
    except OSError as error:  # it may be an image
        return f"{os.path.splitext(name)[1].lower() or NO_EXTENSION} that cannot be read ({error.strerror})"


def why_no_image(name: str, head: Callable[[], bytes]) -> str | None:
    """`why_not_listed` of what is no file: `head`, called if need be, gives its first 32 bytes."""
    if name.startswith("._"):
        return MACOS
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        kind = {".heic": "HEIF", ".heif": "HEIF", ".avif": "AVIF"}.get(extension)
    else:
        kind = content_format(head())
        if kind is None:
            return TAR if extension == ".tar" else extension or NO_EXTENSION
    hint = {"HEIF": HEIF_HINT, "AVIF": AVIF_HINT}.get(kind or "")
    return f"{extension or NO_EXTENSION} ({hint})" if hint and kind not in readable_formats() else None


def skipped_sentence(skipped: Mapping[str, int]) -> str:
    """`5 files skipped: 3 .heic, 2 .mp4`, the most frequent first; empty where none was."""
    if not skipped:
        return ""
    total = sum(skipped.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items(), key=lambda one: (-one[1], one[0])))
    return f"{total} {'file' if total == 1 else 'files'} skipped: {kinds}"


def _head(path: str) -> bytes:
    """The first bytes of a regular file; none of another, as a named pipe would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)
