"""Draws the body of one person, in one pose, seen from one side.

Lengths are those of `sheet`: fractions of the person's height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from mgn_deploy.datasets.drawn.appearance import Appearance
from mgn_deploy.datasets.drawn.head import draw_head
from mgn_deploy.datasets.drawn.sheet import Point, Sheet, shaded


@dataclass(frozen=True)
class Pose:
    """How a person is caught: `facing` is front, back, left or right as the camera sees it."""

    facing: str
    phase: float  # of the step, radians
    stride: float  # swing of the legs, radians
    phone: bool  # one hand at the ear


def draw_body(
    who: Appearance, pose: Pose, size: tuple[int, int], feet: Point, unit: float, stretch: float
) -> Image.Image:
    """The body alone, RGBA, `size` = (width, height) pixels, standing at the pixel `feet`.

    `unit` is the person's height and `unit * stretch` what the same length is across, in pixels.
    """
    if pose.facing == "left":  # the mirror image of a walk to the right
        mirrored = _Figure(who, pose, size, (size[0] - feet[0], feet[1]), unit, stretch)
        return mirrored.drawn_from_the_side().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    figure = _Figure(who, pose, size, feet, unit, stretch)
    return figure.drawn_from_the_side() if pose.facing == "right" else figure.drawn_upright()


class _Figure(Sheet):
    def __init__(
        self, who: Appearance, pose: Pose, size: tuple[int, int], feet: Point, unit: float, stretch: float
    ) -> None:
        bob = 0.012 * abs(math.cos(pose.phase)) * min(1.0, pose.stride * 3)
        super().__init__(size, feet, unit, stretch, bob)
        self.who, self.pose = who, pose
        self.side = pose.facing in ("left", "right")
        self.back = pose.facing == "back"
        self.width = who.build * (0.72 if self.side else 1.0)
        self.upper = self.cloth(who.upper, 0.83)
        self.lower = self.upper if who.lower_kind == "dress" else self.cloth(who.lower, 0.55)

    # ---- parts

    def leg(self, hip: Point, knee: Point, ankle: Point, toe: float, shade: float) -> None:
        who, girth = self.who, 0.5 + 0.5 * self.who.build
        lower, cloth = who.lower.colour, shaded(self.lower, shade)
        skin = shaded(who.skin, shade)
        long = who.lower_kind == "trousers"
        shoe = shaded(who.shoes, shade)
        (x, y), reach = ankle, 0.035 + abs(toe)
        heel, tip = (x - 0.028, x + reach) if toe else (x - 0.032, x + 0.032)
        self.limb(
            knee,
            ankle,
            0.07 * girth,
            0.05 if long else 0.036,
            cloth if long else skin,
            lower if long else skin,
        )
        self.soft([(heel, y + 0.012), (x, y + 0.035), (tip, y - 0.005), (tip, y - 0.04), (heel, y - 0.04)], shoe)
        self.line((heel + 0.006, y - 0.036), (tip - 0.006, y - 0.036), 0.012, who.sole)
        bare = who.lower_kind in ("skirt", "dress")
        end = knee if not long else (knee[0], knee[1] - 0.005)
        self.limb(
            hip,
            end,
            0.1 * girth,
            (0.076 if not bare else 0.06) * girth,
            skin if bare else cloth,
            skin if bare else lower,
        )

    def arm(self, shoulder: Point, elbow: Point, hand: Point, shade: float) -> None:
        who = self.who
        cloth, skin = shaded(self.upper, shade), shaded(who.skin, shade)
        self.limb(
            elbow,
            hand,
            0.042,
            0.032,
            cloth if who.long_sleeves else skin,
            who.upper.colour if who.long_sleeves else skin,
        )
        self.oval(hand[0], hand[1] - 0.012, 0.02, 0.022, skin)
        if not who.long_sleeves:
            self.limb(shoulder, elbow, 0.045, 0.04, skin, skin)
            elbow = (
                shoulder[0] + 0.7 * (elbow[0] - shoulder[0]),
                shoulder[1] + 0.7 * (elbow[1] - shoulder[1]),
            )
        self.limb(shoulder, elbow, 0.06 * (0.5 + 0.5 * who.build), 0.05, cloth, who.upper.colour)

    def torso(self) -> None:
        who, w = self.who, self.width
        if who.lower_kind in ("skirt", "dress"):
            sway = 0.012 * math.sin(self.pose.phase)
            hem = 0.27 if who.lower_kind == "skirt" else 0.24
            flare = [(-0.075 * w, 0.58), (0.075 * w, 0.58), (0.15 * w + sway, hem), (-0.15 * w + sway, hem)]
            self.soft([*flare[:2], (0.13 * w, 0.42), *flare[2:], (-0.13 * w, 0.42)], self.lower, who.lower.colour)
        else:  # the seat of the trousers
            seat = [(-0.09 * w, 0.57), (0.09 * w, 0.57), (0.095 * w, 0.47), (0.0, 0.44), (-0.095 * w, 0.47)]
            self.soft(seat, self.lower, who.lower.colour)
        hem, spread = (0.35, 0.125) if who.coat else (0.515, 0.098)
        top = [(-0.05 * w, 0.86), (0.05 * w, 0.86), (0.125 * w, 0.825), (0.122 * w, 0.74), (0.09 * w, 0.62)]
        bottom = [(spread * w, hem), (spread * w, hem - 0.01), (-spread * w, hem - 0.01), (-spread * w, hem)]
        rest = [(-0.09 * w, 0.62), (-0.122 * w, 0.74), (-0.125 * w, 0.825)]
        self.soft([*top, *bottom, *rest], self.upper, who.upper.colour)
        if who.lower_kind == "dress":
            self.line((-0.09 * w, 0.59), (0.09 * w, 0.59), 0.014, who.upper.second)
        if not self.side and not self.back and who.open_front:
            self.soft([(-0.035, 0.86), (0.035, 0.86), (0.045, hem + 0.01), (-0.045, hem + 0.01)], who.upper.second)
        if not self.side and (who.print_back if self.back else who.print_front):
            half = 0.052 * w
            self.soft([(-half, 0.765), (half, 0.765), (half, 0.665), (-half, 0.665)], who.upper.second)
            self.oval(0, 0.715, 0.025, 0.025, who.upper.colour)

    def backpack(self) -> None:
        colour, w = self.who.bag_colour, self.width
        dark = shaded(colour, 0.75)
        if self.back:
            self.soft(
                [(-0.085, 0.83), (0.085, 0.83), (0.1, 0.68), (0.095, 0.58), (-0.095, 0.58), (-0.1, 0.68)],
                colour,
            )
            self.soft([(-0.062, 0.67), (0.062, 0.67), (0.062, 0.6), (-0.062, 0.6)], dark, colour)
        elif self.side:
            x = -0.075 * w
            self.soft([(x, 0.83), (x - 0.07, 0.81), (x - 0.1, 0.69), (x - 0.09, 0.59), (x + 0.01, 0.59)], colour)
            self.line((x + 0.035, 0.835), (x + 0.045, 0.68), 0.022, colour)
        else:
            for turn in (-1, 1):
                self.line((turn * 0.07, 0.84), (turn * 0.08, 0.63), 0.028, colour)

    def other_bag(self, x: float, hand: Point) -> None:
        colour = self.who.bag_colour
        if self.who.bag == "tote":
            x, y = hand[0], hand[1] - 0.05
            self.line(hand, (x, y), 0.012, colour)
            self.soft([(x - 0.05, y), (x + 0.05, y), (x + 0.065, y - 0.12), (x - 0.065, y - 0.12)], colour)
        elif self.who.bag == "shoulder":
            self.line((-x * (0.4 if not self.side else 0.0), 0.84), (x, 0.56), 0.016, colour)
            self.soft([(x - 0.06, 0.57), (x + 0.06, 0.57), (x + 0.065, 0.46), (x - 0.065, 0.46)], colour)

    # ---- whole figures

    def drawn_upright(self) -> Image.Image:
        """From the front or from behind."""
        who, pose = self.who, self.pose
        swing = math.sin(pose.phase) * min(1.0, pose.stride * 2.2)
        for turn in (-1, 1):
            lift = 0.045 * max(0.0, turn * swing)
            hip, knee = (
                (turn * 0.048 * who.build, 0.48),
                (turn * (0.052 * who.build + lift * 0.3), 0.27 + lift * 0.6),
            )
            self.leg(hip, knee, (turn * 0.052 * who.build, 0.045 + lift), 0.0, 0.86 if lift > 0.015 else 1.0)
        self.torso()
        hands: dict[int, Point] = {}
        for turn in (-1, 1):
            x, bend = turn * 0.118 * who.build, 0.03 * turn * swing
            elbow, hand = (x + turn * 0.035, 0.65), (x + turn * 0.03, 0.5 + bend + 0.02)
            if pose.phone and turn == 1:
                elbow, hand = (x + 0.06, 0.67), (0.075, 0.885)
            hands[turn] = hand
            self.arm((x, 0.8), elbow, hand, 0.93)
        left_hand = 1 if not self.back else -1
        turn = left_hand if who.bag_left else -left_hand
        if who.bag == "backpack":
            self.backpack()
        draw_head(self, who, pose.facing)
        hand = hands[turn] if not pose.phone else hands[-1]
        self.other_bag(turn * 0.12 * who.build, hand)
        if pose.phone:
            self.arm((0.118 * who.build, 0.8), (0.118 * who.build + 0.06, 0.67), hands[1], 0.93)
        return self.image

    def drawn_from_the_side(self) -> Image.Image:
        """Walking to the right; the near side is the person's right one, or the left one once mirrored."""
        who, pose = self.who, self.pose
        near_bag = who.bag_left == (pose.facing == "left")

        def chain(start: Point, first: float, second: float, upper: float, lower: float) -> tuple[Point, Point]:
            middle = (start[0] + upper * math.sin(first), start[1] - upper * math.cos(first))
            return middle, (middle[0] + lower * math.sin(second), middle[1] - lower * math.cos(second))

        def leg(turn: int, shade: float) -> None:
            thigh = turn * pose.stride * math.sin(pose.phase)
            bend = 0.15 + 1.3 * pose.stride * max(0.0, turn * math.cos(pose.phase))
            knee, ankle = chain((0.0, 0.48), thigh, thigh - bend, 0.22, 0.21)
            self.leg((0.0, 0.48), knee, (ankle[0], max(0.045, ankle[1])), 0.03, shade)

        def arm(turn: int) -> tuple[Point, Point]:
            if pose.phone and turn == 1:
                return (0.05, 0.68), (0.035, 0.88)
            angle = turn * 0.85 * pose.stride * math.sin(pose.phase)
            return chain((0.0, 0.8), angle - 0.05, angle + 0.3, 0.155, 0.14)

        self.arm((0.0, 0.8), *arm(-1), 0.7)
        if not near_bag:
            self.other_bag(0.0, arm(-1)[1])
        leg(1, 0.72)
        leg(-1, 1.0)
        if who.bag == "backpack":
            self.backpack()
        self.torso()
        draw_head(self, who, pose.facing)
        if who.bag == "backpack":
            self.line((-0.02, 0.845), (-0.01, 0.68), 0.024, who.bag_colour)
        self.arm((0.0, 0.8), *arm(1), 0.93)
        if near_bag:
            self.other_bag(0.0, arm(1)[1])
        return self.image
