"""What one drawn person looks like, in every camera and every frame."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy

Colour = tuple[int, int, int]

# Small palettes on purpose: many people share a black jacket or blue jeans, as in a street, so that no single
# colour names a person and the combination of parts has to.
SKIN: tuple[Colour, ...] = ((247, 214, 190), (232, 190, 160), (205, 155, 120), (160, 110, 78), (112, 74, 52))
HAIR: tuple[Colour, ...] = (
    (28, 24, 24),
    (58, 38, 26),
    (98, 64, 36),
    (196, 158, 92),
    (150, 72, 40),
    (176, 174, 172),
)
CLOTHES: tuple[Colour, ...] = (
    (34, 34, 40),
    (92, 94, 100),
    (232, 230, 224),
    (36, 50, 96),
    (88, 142, 200),
    (196, 42, 46),
    (226, 172, 46),
    (58, 116, 66),
    (192, 164, 122),
    (224, 132, 166),
    (112, 70, 140),
    (36, 142, 146),
    (228, 118, 44),
)
CLOTHES_WEIGHTS = (4, 3, 4, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2)
TROUSERS: tuple[Colour, ...] = (
    (38, 38, 44),
    (44, 60, 104),
    (96, 134, 184),
    (128, 128, 132),
    (188, 166, 126),
    (84, 92, 58),
    (226, 222, 214),
    (124, 54, 50),
)
TROUSERS_WEIGHTS = (4, 4, 3, 2, 2, 2, 2, 1)
PATTERNS = ("plain", "rows", "columns", "checks", "block", "dots")


@dataclass(frozen=True)
class Garment:
    """A cloth: its main colour, a second one, and how they are laid out (a name in PATTERNS).

    `period` is the repeat of the pattern as a fraction of the person's height.
    """

    colour: Colour
    second: Colour
    pattern: str
    period: float


@dataclass(frozen=True)
class Appearance:
    """Everything about a person that does not change between frames."""

    skin: Colour
    hair: Colour
    hair_style: str  # bald, short, curly, long, bun, ponytail
    headwear: str  # none, cap, beanie, brim, scarf
    headwear_colour: Colour
    beard: bool
    glasses: bool
    build: float  # width of the body, 1 is average
    head: float  # size of the head: children and short people have a larger one
    upper: Garment
    long_sleeves: bool
    coat: bool
    open_front: bool  # a jacket worn open: upper.second shows in front only
    print_front: bool
    print_back: bool
    lower_kind: str  # trousers, shorts, skirt, dress
    lower: Garment
    shoes: Colour
    sole: Colour
    bag: str  # none, backpack, shoulder, tote
    bag_colour: Colour
    bag_left: bool


def _pick(rng: numpy.random.Generator, colours: tuple[Colour, ...], weights: tuple[int, ...] | None = None) -> Colour:
    chances = None if weights is None else numpy.asarray(weights) / sum(weights)
    return colours[int(rng.choice(len(colours), p=chances))]


def _contrasting(rng: numpy.random.Generator, colour: Colour) -> Colour:
    far = tuple(c for c in CLOTHES if sum(abs(a - b) for a, b in zip(c, colour, strict=True)) > 150)
    return _pick(rng, far)


def _one_of(rng: numpy.random.Generator, **chances: float) -> str:
    return str(rng.choice(list(chances), p=numpy.asarray(list(chances.values())) / sum(chances.values())))


@functools.lru_cache(maxsize=4096)
def appearance_of(identity: int, seed: int) -> Appearance:
    """The person number `identity` of the world `seed`."""
    rng = numpy.random.default_rng([seed, 1, identity])
    colour = _pick(rng, CLOTHES, CLOTHES_WEIGHTS)
    pattern = _one_of(rng, plain=40, rows=16, columns=8, checks=12, block=16, dots=8)
    upper = Garment(colour, _contrasting(rng, colour), pattern, float(rng.uniform(0.045, 0.075)))
    lower_kind = _one_of(rng, trousers=60, shorts=16, skirt=16, dress=8)
    lower_colour = _pick(rng, TROUSERS, TROUSERS_WEIGHTS)
    lower = Garment(
        lower_colour,
        _contrasting(rng, lower_colour),
        _one_of(rng, plain=78, columns=6, checks=10, rows=6),
        float(rng.uniform(0.05, 0.08)),
    )
    if lower_kind == "dress":
        lower = upper
    coat = lower_kind == "trousers" and bool(rng.random() < 0.18)
    long_sleeves = coat or bool(rng.random() < 0.5)
    open_front = long_sleeves and lower_kind != "dress" and bool(rng.random() < 0.35)
    printed = pattern == "plain" and not open_front and bool(rng.random() < 0.5)
    headwear = _one_of(rng, none=70, cap=11, beanie=7, brim=6, scarf=6)
    hair_style = _one_of(rng, bald=8, short=36, curly=12, long=20, bun=11, ponytail=13)
    return Appearance(
        skin=_pick(rng, SKIN),
        hair=_pick(rng, HAIR, (5, 4, 3, 3, 1, 2)),
        hair_style=hair_style,
        headwear=headwear,
        headwear_colour=_pick(rng, CLOTHES),
        beard=hair_style in ("bald", "short") and headwear != "scarf" and bool(rng.random() < 0.3),
        glasses=bool(rng.random() < 0.2),
        build=float(rng.uniform(0.84, 1.24)),
        head=float(rng.uniform(1.0, 1.2)),
        upper=upper,
        long_sleeves=long_sleeves,
        coat=coat,
        open_front=open_front,
        print_front=printed,
        print_back=printed and bool(rng.random() < 0.4),
        lower_kind=lower_kind,
        lower=lower,
        shoes=_pick(rng, CLOTHES, (6, 2, 5, 2, 1, 2, 1, 0, 3, 1, 0, 0, 0)),
        sole=(236, 234, 228) if rng.random() < 0.5 else (40, 38, 38),
        bag=_one_of(rng, none=48, backpack=24, shoulder=16, tote=12),
        bag_colour=_pick(rng, CLOTHES),
        bag_left=bool(rng.random() < 0.5),
    )
