"""What all pages share: thumbnails inlined, text of which every character can be seen, templates that escape."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.gallery.crops import crops
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import Store

THUMBNAIL_SIDE = 192  # pixels; about twice what a page shows, for dense screens and print
JPEG_QUALITY = 85


def write_page(out: Path, template: str, **values: Any) -> None:
    """Write a page of a template beside this file, part by part; it replaces `out` only once it is whole.

    Every value is escaped, and what has no glyph in it spelled out.

    Raises:
        UserError: `out` cannot be written or the disk is full; an earlier page there is kept.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template).stream(values)
    with atomic_file(out) as file:
        page.dump(file, "utf-8")


def today() -> str:
    """Date and time of this machine, as pages show it."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def read_thumbnail(load: Callable[[], Image.Image]) -> dict[str, Any]:
    """An image's `width`, `height` and `jpeg` (base64) as a page inlines it, or the `problem` of one that is gone.

    Args:
        load: gives the image; what it raises of UnreadableImage or UserError is the problem.
    """
    try:
        return _inlined(load(), THUMBNAIL_SIDE, JPEG_QUALITY)
    except (UnreadableImage, UserError) as reason:
        return {"problem": str(reason)}


def _inlined(thumbnail: Image.Image, side: int, quality: int) -> dict[str, Any]:
    data = base64.b64encode(shrunk_jpeg(thumbnail, side, quality)).decode("ascii")
    return {"width": thumbnail.width, "height": thumbnail.height, "jpeg": data}


def shrunk_jpeg(image: Image.Image, side: int, quality: int) -> bytes:
    """A JPEG without metadata; the image itself is shrunk to at most `side` pixels a side."""
    image.thumbnail((side, side))
    image.info.clear()  # Pillow would carry a JPEG comment over
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality)
    return jpeg.getvalue()


def row_thumbnails(store: Store, rows: Iterable[Row], side: int, quality: int) -> Iterator[dict[str, Any]]:
    """`read_thumbnail` of each row; a photo or video is read once for its rows that follow each other."""
    for _, group in groupby(rows, key=lambda row: row.file):
        together = list(group)
        try:
            images = [image for _, image in crops(store, together)]
        except UserError as reason:
            images = [str(reason)] * len(together)
        for image in images:
            yield {"problem": image} if isinstance(image, str) else _inlined(image, side, quality)


def spelled_out(value: Any) -> Any:
    """Text of which every character can be seen; Jinja2 escapes it afterwards.

    What has no glyph is spelled out (a newline as \\n, a byte that is not UTF-8 as \\udcff): the page stays valid
    UTF-8, names that differ look different, and no control character turns the text around it.
    """
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in value
    )
