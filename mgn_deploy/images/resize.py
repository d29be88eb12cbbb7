"""Resizing to pixels that no release of Pillow changes."""

from __future__ import annotations

from PIL import Image


def resized(
    image: Image.Image,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """`image.resize(size, resample, box)` with the horizontal pass first, as Pillow does in all releases before 13.

    Pillow rounds to 8 bits between its passes, and since 13 (https://github.com/python-pillow/Pillow/pull/9549) it
    resizes vertically first where the height shrinks more than the width. A call with one pass has no order.

    Args:
        image: RGB or grey (an alpha channel would be divided out between the passes).
        size: width and height of the result, in pixels.
        resample: Pillow's filter.
        box: left, top, right and bottom of the part that is resized; None: the whole image.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    across = image.resize((size[0], image.height), resample, box=(left, 0, right, image.height))
    return across.resize(size, resample, box=(0, top, size[0], bottom))
