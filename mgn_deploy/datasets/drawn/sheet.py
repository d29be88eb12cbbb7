"""A transparent sheet to draw a body on, in lengths of the body.

Lengths are fractions of the person's height: x to the right of the body's axis, y above the ground.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import overload

import numpy
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mgn_deploy.datasets.drawn.appearance import Colour, Garment

Point = tuple[float, float]
Paint = Colour | Image.Image  # a plain colour, or an RGBA picture of a pattern as large as the sheet


@overload
def shaded(paint: Colour, factor: float) -> Colour: ...
@overload
def shaded(paint: Paint, factor: float) -> Paint: ...
def shaded(paint: Paint, factor: float) -> Paint:
    if factor == 1.0:
        return paint
    if isinstance(paint, Image.Image):
        return Image.blend(Image.new("RGBA", paint.size, (0, 0, 0, 255)), paint, factor)
    return (int(paint[0] * factor), int(paint[1] * factor), int(paint[2] * factor))


@functools.cache
def _rounding(corners: int) -> NDArray[numpy.float64]:
    """Chaikin's corner cutting, twice, as a matrix: [4 * corners, corners]."""
    outline = numpy.eye(corners)
    for _ in range(2):
        following = numpy.roll(outline, -1, axis=0)
        cut = (0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following)
        outline = numpy.stack(cut, 1).reshape(-1, corners)
    return outline


_ARC = tuple((math.cos(a), math.sin(a)) for a in (math.pi * (k / 5 - 0.5) for k in range(6)))


class Sheet:
    """`size` = (width, height) pixels; the body stands at the pixel `feet` and is `unit` pixels high.

    `stretch` widens what lies across, `bob` lifts all above the knees as a step does.
    """

    def __init__(self, size: tuple[int, int], feet: Point, unit: float, stretch: float, bob: float) -> None:
        self.feet, self.unit, self.stretch, self.bob = feet, unit, stretch, bob
        self.image = Image.new("RGBA", size)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, x: float, y: float) -> Point:
        return self.feet[0] + x * self.unit * self.stretch, self.feet[1] - (y + self.bob * (y > 0.3)) * self.unit

    def cloth(self, garment: Garment, top: float) -> Paint:
        """A plain colour, or a picture of the pattern that moves with the body."""
        if garment.pattern == "plain":
            return garment.colour
        picture = Image.new("RGBA", self.image.size, garment.colour)
        draw = ImageDraw.Draw(picture)
        (width, height), (left, first) = picture.size, self.at(0, top)
        if garment.pattern == "block":
            draw.rectangle((0, int(self.at(0, 0.685)[1]), width, height), fill=garment.second)
            return picture
        step = garment.period * self.unit
        rows = [first + step * k for k in range(-2, int(0.9 / garment.period))]
        columns = [left + step * (k + 0.5) for k in range(-8, 8)]
        if garment.pattern == "dots":
            radius = step * 0.24
            for k, y in enumerate(rows):
                for x in columns:
                    x += step * 0.5 * (k % 2)
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=garment.second)
        thick = step * (0.45 if garment.pattern != "checks" else 0.3)
        if garment.pattern in ("rows", "checks"):
            for y in rows:
                draw.rectangle((0, y, width, y + thick), fill=garment.second)
        if garment.pattern in ("columns", "checks"):
            for x in columns:
                draw.rectangle((x, 0, x + thick, height), fill=garment.second)
        return picture

    def shape(self, outline: list[float], paint: Paint, edge: Colour) -> None:
        """A closed polygon x, y, x, y, ... in pixels, with a line around it in a darker `edge`."""
        line = (*shaded(edge, 0.72), 255)
        if isinstance(paint, Image.Image):
            mask = Image.new("1", self.image.size)
            ImageDraw.Draw(mask).polygon(outline, fill=1)
            self.image.paste(paint, mask=mask)
            self.draw.polygon(outline, outline=line)
        else:
            self.draw.polygon(outline, fill=(*paint, 255), outline=line)

    def soft(self, points: Sequence[Point], paint: Paint, edge: Colour | None = None) -> None:
        """A rounded shape; a pattern needs the colour of its `edge`."""
        if edge is None:
            assert not isinstance(paint, Image.Image)
            edge = paint
        corners = numpy.asarray([self.at(x, y) for x, y in points])
        self.shape((_rounding(len(points)) @ corners).ravel().tolist(), paint, edge)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        (left, top), (right, bottom) = self.at(x - rx, y + ry), self.at(x + rx, y - ry)
        self.draw.ellipse((left, top, right, bottom), fill=(*colour, 255))

    def line(self, start: Point, end: Point, thickness: float, colour: Colour) -> None:
        width = max(1, round(thickness * self.unit))
        self.draw.line((*self.at(*start), *self.at(*end)), fill=(*colour, 255), width=width)

    def limb(self, start: Point, end: Point, wide: float, narrow: float, paint: Paint, edge: Colour) -> None:
        """A tapered capsule from one joint to the next."""
        (ax, ay), (bx, by) = self.at(*start), self.at(*end)
        length = math.hypot(bx - ax, by - ay) or 1.0
        dx, dy = (bx - ax) / length * self.unit / 2, (by - ay) / length * self.unit / 2
        outline: list[float] = []
        for x, y, radius in ((bx, by, narrow), (ax, ay, -wide)):
            for along, across in _ARC:
                outline += (x + radius * (along * dx - across * dy), y + radius * (along * dy + across * dx))
        self.shape(outline, paint, edge)
