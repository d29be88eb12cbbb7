"""One detector's box: a drawn person in a camera's place, with their shadow and what stands in the way."""

from __future__ import annotations

import math

import numpy
from PIL import Image, ImageDraw

from mgn_deploy.datasets.drawn.appearance import Appearance, appearance_of
from mgn_deploy.datasets.drawn.camera import FACINGS, Camera, Floats, background, camera_of, expose
from mgn_deploy.datasets.drawn.person import Pose, draw_body
from mgn_deploy.errors import UserError
from mgn_deploy.images.resize import resized

Feet = tuple[float, float]


def draw_crop(identity: int, camera: int, frame: int, *, seed: int = 0) -> Image.Image:
    """One RGB pedestrian crop, 46-86 px wide and 110-180 px high, varying as a detector's boxes do.

    Raises:
        UserError: a number is negative.
    """
    if min(identity, camera, frame, seed) < 0:
        raise UserError(f"a drawn person is numbered from 0, not {identity=}, {camera=}, {frame=}, {seed=}")
    rng = numpy.random.default_rng([seed, 3, identity, camera, frame])
    view = camera_of(camera, seed)
    width, height = size = _box_size(view, rng)
    unit = height * rng.uniform(0.84, 0.96)
    feet = (width * rng.normal(0.5, 0.035), height - (height - unit) * rng.uniform(0.3, 0.7))
    if rng.random() < 0.15:  # a bad box: it cuts the feet or the head
        unit *= rng.uniform(1.08, 1.22)
        feet = (feet[0], height + (unit - height) * rng.choice((0.15, 0.95)))
    return _photograph(appearance_of(identity, seed), view, size, feet, unit, rng)


def draw_junk(camera: int, frame: int, *, seed: int = 0) -> Image.Image:
    """A detector's bad box: a fragment of a body, too near or at the edge. Sizes and errors as draw_crop."""
    rng = numpy.random.default_rng([seed, 4, camera, frame])
    view = camera_of(camera, seed)
    width, height = size = _box_size(view, rng)
    unit = height * rng.uniform(1.7, 2.6)
    feet = (width * rng.uniform(-0.1, 1.1), height + unit * rng.uniform(-0.1, 0.6))
    return _photograph(appearance_of(int(rng.integers(1 << 30)), seed), view, size, feet, unit, rng)


def _box_size(view: Camera, rng: numpy.random.Generator) -> tuple[int, int]:
    height = int(rng.integers(*view.preset.heights, endpoint=True))
    return round(height * rng.uniform(0.42, 0.48)), height


def _photograph(
    who: Appearance, view: Camera, size: tuple[int, int], feet: Feet, unit: float, rng: numpy.random.Generator
) -> Image.Image:
    stretch = rng.uniform(0.94, 1.06)
    scene = background(view, size, rng)
    _cast_shadow(scene, feet, unit, view.preset.light)
    body = _body(who, _pose(view, rng), size, feet, unit, stretch)
    _paste(scene, body, _shading(size, feet[0], unit, view.preset.light, rng))
    if rng.random() < 0.15:
        _paste(scene, _obstacle(view, size, feet, unit, rng), 1.0)
    return expose(view, scene, rng)


def _pose(view: Camera, rng: numpy.random.Generator) -> Pose:
    stride = 0.04 if rng.random() < 0.15 else rng.uniform(0.25, 0.55)
    facing = str(rng.choice(FACINGS, p=view.preset.facing))
    return Pose(facing, float(rng.uniform(0, 2 * math.pi)), float(stride), bool(rng.random() < 0.07))


def _body(who: Appearance, pose: Pose, size: tuple[int, int], feet: Feet, unit: float, stretch: float) -> Image.Image:
    """Drawn at twice the size: Pillow's polygons have hard edges."""
    large = (size[0] * 2, size[1] * 2)
    return draw_body(who, pose, large, (feet[0] * 2, feet[1] * 2), unit * 2, stretch).reduce(2)


def _paste(scene: Floats, layer: Image.Image, shading: Floats | float) -> None:
    pixels = numpy.asarray(layer, numpy.float32)
    cover = pixels[..., 3:] / 255
    scene += cover * (pixels[..., :3] * shading - scene)


def _cast_shadow(scene: Floats, feet: Feet, unit: float, light: float) -> None:
    """Darkens the ground in place: under the shoes, and a longer patch away from the light."""
    across = (numpy.arange(scene.shape[1]) - feet[0]) / unit
    along = (numpy.arange(scene.shape[0]) - feet[1]) / unit + 0.035
    contact = numpy.outer(numpy.exp(-((along / 0.022) ** 2)), numpy.exp(-((across / 0.13) ** 2)))
    away = numpy.exp(-(((across + 0.16 * light) / 0.2) ** 2))
    patch = numpy.outer(numpy.exp(-(((along - 0.02 * abs(light)) / 0.035) ** 2)), away)
    scene *= (1 - 0.5 * contact - 0.3 * abs(light) * patch * (1 - contact)).astype(numpy.float32)[..., None]


def _shading(size: tuple[int, int], axis: float, unit: float, light: float, rng: numpy.random.Generator) -> Floats:
    """Float32 [height, width, 1] factors: lit from one side, folds, sometimes a shadow's edge."""
    width, height = size
    folds = resized(Image.fromarray(rng.integers(0, 255, (14, 7), dtype=numpy.uint8)), size, Image.Resampling.BICUBIC)
    sideways = numpy.clip((numpy.arange(width, dtype=numpy.float32) - axis) / (0.15 * unit), -1, 1)
    factors = (1 + 0.2 * light * sideways - 0.1 * sideways**2) + (numpy.asarray(folds, numpy.float32) - 127) / 1100
    if rng.random() < 0.2:
        edge = rng.uniform(0.3, 0.7) * height + rng.uniform(-0.8, 0.8) * (numpy.arange(width) - axis)
        below = numpy.arange(height)[:, None] > edge
        factors[below == (rng.random() < 0.5)] *= 0.62
    return factors.astype(numpy.float32, copy=False)[..., None]


def _obstacle(view: Camera, size: tuple[int, int], feet: Feet, unit: float, rng: numpy.random.Generator) -> Image.Image:
    """Something between the camera and the person: RGBA, `size`."""
    width, height = size
    side = float(rng.choice((-1, 1)))
    kind = rng.choice(("post", "leaves", "bin", "passer-by"))
    if kind == "passer-by":
        other = appearance_of(int(rng.integers(1 << 30)), 0)
        aside = (feet[0] + side * width * rng.uniform(0.38, 0.55), feet[1] + unit * 0.03)
        return _body(other, _pose(view, rng), size, aside, unit * rng.uniform(0.95, 1.1), 1.0)
    layer = Image.new("RGBA", (width * 2, height * 2))
    draw = ImageDraw.Draw(layer)
    if kind == "post":
        x, half = 2 * (feet[0] + side * width * rng.uniform(0.08, 0.3)), width * rng.uniform(0.07, 0.12)
        draw.rectangle((x - half, 0, x + half, height * 2), fill=(96, 100, 104, 255))
        draw.rectangle((x - half * 0.5, 0, x - half * 0.1, height * 2), fill=(146, 150, 152, 255))
    elif kind == "leaves":
        for _ in range(70):
            x, y = (
                feet[0] * 2 + side * abs(rng.normal(0.55, 0.22)) * width * 2,
                rng.uniform(1.1, 2.0) * height,
            )
            a, b = rng.uniform(3, 8, 2)
            draw.ellipse(
                (x - a, y - b, x + a, y + b),
                fill=(int(rng.integers(40, 90)), int(rng.integers(90, 150)), 56, 255),
            )
    else:
        x, top = (
            2 * feet[0] + side * width * rng.uniform(0.3, 0.6),
            2 * (feet[1] - unit * rng.uniform(0.28, 0.38)),
        )
        half = width * 0.36
        draw.rectangle((x - half, top, x + half, height * 2), fill=(66, 84, 78, 255))
        draw.rectangle((x - half * 1.12, top - 6, x + half * 1.12, top + 4), fill=(44, 58, 54, 255))
    return layer.reduce(2)
