"""What a surveillance camera does to everything it sees: its place, its light, its lens, its compression."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mgn_deploy.images.resize import resized

Colour = tuple[int, int, int]
Floats = NDArray[numpy.float32]

FACINGS = ("front", "back", "left", "right")
SCENE_WIDTH, SCENE_HEIGHT = 420, 200


@dataclass(frozen=True)
class Preset:
    """A kind of camera. `facing`: the chances of FACINGS; a camera over a gate sees mostly faces or backs."""

    place: str  # pavement, lawn, corridor, bricks
    cast: tuple[float, float, float]
    gamma: float
    saturation: float
    haze: float  # share of grey light scattered in the lens
    facing: tuple[float, float, float, float]
    heights: tuple[int, int]  # of the crops, pixels
    blur: float  # radius, pixels
    light: float  # -1: lit from the left, 1: from the right


# The casts are strong enough that the same coat has another colour in each camera, so that a colour histogram
# does not find a person again; weak enough that the two garments of one person keep their relation.
PRESETS = (
    Preset("pavement", (1.06, 1.01, 0.92), 0.93, 1.05, 0.02, (0.5, 0.2, 0.15, 0.15), (140, 180), 0.4, 0.8),
    Preset("lawn", (0.86, 0.95, 0.93), 1.04, 0.95, 0.04, (0.2, 0.4, 0.2, 0.2), (115, 155), 0.6, -0.6),
    Preset("corridor", (1.05, 0.94, 0.79), 1.00, 0.92, 0.05, (0.35, 0.35, 0.15, 0.15), (125, 170), 0.7, 0.2),
    Preset("bricks", (0.85, 0.90, 1.05), 0.98, 0.85, 0.08, (0.1, 0.1, 0.4, 0.4), (110, 145), 0.5, -0.9),
    Preset("pavement", (0.78, 0.77, 0.86), 1.07, 0.75, 0.10, (0.2, 0.2, 0.3, 0.3), (120, 160), 0.7, 0.5),
    Preset("lawn", (1.10, 1.06, 0.90), 0.90, 1.10, 0.02, (0.3, 0.3, 0.2, 0.2), (130, 175), 0.4, 0.9),
)
# Backgrounds are mixed with this grey, three parts of five: they are places, but the person has to stand out.
MIST = (140, 138, 134)


@dataclass(frozen=True, eq=False)
class Camera:
    preset: Preset
    cast: Floats  # [3], gain of red, green and blue
    gamma: float
    far: Image.Image  # the upper part of the scene: a wall, trees
    near: Image.Image  # the ground
    quality: int  # of its JPEG stream


@functools.lru_cache(maxsize=64)
def camera_of(number: int, seed: int) -> Camera:
    """The camera `number` (from 1) of the world `seed`: one of the presets, varied."""
    rng = numpy.random.default_rng([seed, 2, number])
    preset = PRESETS[(number - 1) % len(PRESETS)]
    cast = numpy.asarray(preset.cast, numpy.float32) * rng.uniform(0.93, 1.07, 3).astype(numpy.float32)
    far, near = _scene(preset.place, rng)
    return Camera(preset, cast, preset.gamma * rng.uniform(0.95, 1.05), far, near, int(rng.integers(45, 75)))


# ---- the place


def _weathered(picture: Image.Image, rng: numpy.random.Generator, strength: float) -> Image.Image:
    """Muted, with fine grain over broad stains as on asphalt, plaster and grass."""
    width, height = picture.size
    coarse = Image.fromarray(rng.integers(0, 255, (8, 16), dtype=numpy.uint8))
    stains = resized(coarse, (width, height), Image.Resampling.BICUBIC)
    grain = (
        rng.normal(0, strength, (height, width, 1))
        + (numpy.asarray(stains, numpy.float32)[..., None] - 127) * strength / 90
    )
    muted = Image.blend(Image.new("RGB", picture.size, MIST), picture, 0.4)
    return Image.fromarray((numpy.asarray(muted) + grain).clip(0, 255).astype(numpy.uint8))


def _scene(place: str, rng: numpy.random.Generator) -> tuple[Image.Image, Image.Image]:
    shift = int(rng.integers(-12, 13))
    far_colour, near_colour = {
        "pavement": ((172, 166, 156), (146, 144, 142)),
        "lawn": ((84, 112, 72), (112, 142, 78)),
        "corridor": ((206, 200, 186), (150, 138, 120)),
        "bricks": ((152, 92, 76), (128, 124, 120)),
    }[place]
    far = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), tuple(v + shift for v in far_colour))
    near = Image.new("RGB", (SCENE_WIDTH, SCENE_HEIGHT), tuple(v + shift for v in near_colour))
    _FAR[place](ImageDraw.Draw(far), rng)
    _NEAR[place](ImageDraw.Draw(near), rng)
    strength = 9.0 if place in ("lawn", "pavement") else 5.0
    return _weathered(far, rng, strength * 0.7), _weathered(near, rng, strength)


def _shop_front(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    x = 0
    while x < SCENE_WIDTH:
        width = int(rng.integers(36, 70))
        glass = tuple(int(v) for v in rng.integers(56, 110, 3))
        draw.rectangle((x + 6, 60, x + width, 185), fill=glass, outline=(92, 88, 84))
        draw.polygon([(x + 10, 185), (x + 22, 60), (x + 32, 60), (x + 20, 185)], fill=tuple(v + 26 for v in glass))
        draw.rectangle((x + 2, 42, x + width + 4, 62), fill=tuple(int(v) for v in rng.integers(70, 200, 3)))
        x += width + 8


def _trees(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    for _ in range(170):
        x, y, r = rng.integers(0, SCENE_WIDTH), rng.integers(0, SCENE_HEIGHT - 30), rng.integers(6, 22)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(int(rng.integers(44, 104)), int(rng.integers(84, 136)), 62))
    for x in rng.integers(0, SCENE_WIDTH, 7):
        draw.rectangle((x, 70, x + int(rng.integers(6, 12)), SCENE_HEIGHT), fill=(88, 70, 54))


def _doors(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    for x in range(10, SCENE_WIDTH, 84):
        draw.rectangle((x, 30, x + 46, 200), fill=(134, 104, 74), outline=(92, 70, 52), width=2)
        draw.ellipse((x + 38, 116, x + 43, 121), fill=(214, 196, 120))
        draw.rectangle(
            (x + 56, 70, x + 76, 98),
            fill=tuple(int(v) for v in rng.integers(90, 230, 3)),
            outline=(70, 66, 60),
        )
    draw.rectangle((0, 188, SCENE_WIDTH, 200), fill=(104, 92, 80))


def _bricks(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    for row in range(0, SCENE_HEIGHT, 7):
        for x in range(-8 * (row % 2), SCENE_WIDTH, 16):
            tone = int(rng.integers(-16, 17))
            draw.rectangle((x, row, x + 14, row + 5), fill=(150 + tone, 88 + tone, 72 + tone))
    for x in range(20, SCENE_WIDTH, 140):
        draw.rectangle((x, 40, x + 44, 110), fill=(70, 84, 100), outline=(220, 214, 204), width=3)


def _slabs(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    y, step = 8.0, 9.0
    draw.rectangle((0, 0, SCENE_WIDTH, 6), fill=(116, 114, 112))
    while y < SCENE_HEIGHT:
        draw.line((0, y, SCENE_WIDTH, y), fill=(120, 118, 116))
        for x in numpy.arange(rng.integers(0, 20), SCENE_WIDTH, step * 2.6):
            draw.line((x, y, x + step * 0.4, y + step), fill=(120, 118, 116))
        y, step = y + step, step * 1.18


def _lawn(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    draw.polygon([(0, 30), (SCENE_WIDTH, 12), (SCENE_WIDTH, 74), (0, 104)], fill=(178, 164, 132))
    for _ in range(500):
        x, y = int(rng.integers(SCENE_WIDTH)), int(rng.integers(SCENE_HEIGHT))
        draw.line((x, y, x + int(rng.integers(-2, 3)), y - 4), fill=(84, int(rng.integers(110, 150)), 60))


def _floor(draw: ImageDraw.ImageDraw, rng: numpy.random.Generator) -> None:
    for row, y in enumerate(range(0, SCENE_HEIGHT, 16)):
        for column, x in enumerate(range(0, SCENE_WIDTH, 24)):
            if (row + column) % 2:
                draw.rectangle((x, y, x + 23, y + 15), fill=(170, 158, 138))


_FAR = {"pavement": _shop_front, "lawn": _trees, "corridor": _doors, "bricks": _bricks}
_NEAR = {"pavement": _slabs, "lawn": _lawn, "corridor": _floor, "bricks": _slabs}


def background(view: Camera, size: tuple[int, int], rng: numpy.random.Generator) -> Floats:
    """What stands behind the person, float32 [height, width, 3]; far and near parts shift independently."""
    width, height = size
    picture = Image.new("RGB", size)
    horizon = int(height * rng.uniform(0.45, 0.8))
    scale = rng.uniform(0.8, 1.0)
    for part, top, bottom in ((view.far, 0, horizon), (view.near, horizon, height)):
        tall, wide = round((bottom - top) * scale), round(width * scale)
        x = int(rng.integers(0, SCENE_WIDTH - wide))
        y = SCENE_HEIGHT - tall if part is view.far else 0
        cut = resized(part, (width, bottom - top), Image.Resampling.BILINEAR, (x, y, x + wide, y + tall))
        picture.paste(cut, (0, top))
    return numpy.asarray(picture, numpy.float32) * numpy.float32(rng.uniform(0.7, 1.25))


# ---- the sensor


def expose(view: Camera, scene: Floats, rng: numpy.random.Generator) -> Image.Image:
    """A scene (float32 [height, width, 3], 0-255) as this camera delivers it: light, lens, noise, JPEG."""
    preset = view.preset
    own, shared = (1 - preset.haze) * preset.saturation, (1 - preset.haze) * (1 - preset.saturation) / 3
    mixing = numpy.full((3, 3), shared, numpy.float32) + numpy.eye(3, dtype=numpy.float32) * own
    light = (scene @ mixing + 150 * preset.haze).clip(0, 255).astype(numpy.uint8)
    gain = view.cast * rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    response = 255 * numpy.clip(gain * numpy.arange(256)[:, None] / 255, 0, 1) ** view.gamma
    picture = Image.fromarray(response.astype(numpy.uint8)[light, numpy.arange(3)])
    if rng.random() < 0.2:  # far away: few pixels, enlarged by the detector's crop
        scale = rng.uniform(0.36, 0.58)
        small = picture.reduce(2) if scale < 0.45 else picture
        few = (round(picture.width * scale), round(picture.height * scale))
        picture = resized(resized(small, few, Image.Resampling.BILINEAR), picture.size, Image.Resampling.BILINEAR)
    picture = picture.filter(ImageFilter.BoxBlur(preset.blur * rng.uniform(0.6, 1.4)))
    noise = rng.standard_normal((picture.height, picture.width, 1), dtype=numpy.float32) * rng.uniform(1.5, 6.0)
    noisy = Image.fromarray((numpy.asarray(picture) + noise).clip(0, 255).astype(numpy.uint8))
    stream = io.BytesIO()
    noisy.save(stream, "JPEG", quality=view.quality)
    with Image.open(stream) as compressed:
        return compressed.convert("RGB")
