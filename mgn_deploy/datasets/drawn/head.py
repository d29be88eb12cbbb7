"""Draws a head: face, hair and what is worn on it."""

from __future__ import annotations

import math

from mgn_deploy.datasets.drawn.appearance import Appearance, Colour
from mgn_deploy.datasets.drawn.sheet import Point, Sheet, shaded

CENTRE = 0.925  # height of the middle of the head
EYES: Colour = (46, 34, 30)
GLASSES: Colour = (30, 30, 34)


def draw_head(sheet: Sheet, who: Appearance, facing: str) -> None:
    """The neck and all above it, onto `sheet`. `facing`: front, back, or else to the right."""
    _Head(sheet, who, facing).drawn()


class _Head:
    """Works in half-widths (u, to the right) and half-heights (v, upwards) of the head, from its middle."""

    def __init__(self, sheet: Sheet, who: Appearance, facing: str) -> None:
        self.sheet, self.who = sheet, who
        self.back, self.front = facing == "back", facing == "front"
        self.side = not (self.back or self.front)
        self.rx, self.ry = 0.05 * who.head, 0.066 * who.head
        self.look = 0.48 if self.side else 0.0  # where the face's middle is

    def at(self, u: float, v: float) -> Point:
        return u * self.rx, CENTRE + v * self.ry

    def soft(self, points: list[Point], colour: Colour) -> None:
        self.sheet.soft([self.at(u, v) for u, v in points], colour)

    def oval(self, u: float, v: float, ru: float, rv: float, colour: Colour) -> None:
        self.sheet.oval(*self.at(u, v), ru * self.rx, rv * self.ry, colour)

    def drawn(self) -> None:
        who = self.who
        hooded = who.headwear == "scarf"
        if who.hair_style == "long" and not hooded and not self.back:
            left, right = (-1.47, -0.17) if self.side else (-1.15, 1.15)
            self.soft([(left, 0), (right, 0), (right, -1.9), (left, -1.9)], who.hair)
        self.sheet.limb((0, 0.87), (0, 0.83), 0.055, 0.06, shaded(who.skin, 0.85), who.skin)
        self.oval(self.look * 0.3, 0, 1, 1, who.skin)
        if hooded:
            self.soft([(-1.35, -1.45), (-1.3, 0.7), (0, 1.4), (1.3, 0.7), (1.35, -1.45)], who.headwear_colour)
            if not self.back:
                self.oval(self.look, -0.05, 0.5 if self.side else 0.72, 0.75, who.skin)
        if not self.back:
            self.face()
        if who.hair_style != "bald" and not hooded:
            self.hair()
        self.hat()

    def face(self) -> None:
        who = self.who
        if self.side:
            self.oval(1.1, -0.17, 0.22, 0.14, who.skin)  # the nose
        if who.beard and self.side:
            self.soft([(-0.5, -0.4), (0.3, -0.4), (0.95, -0.6), (0.75, -1.1), (0, -1.05)], who.hair)
        elif who.beard:
            self.soft([(-0.95, -0.15), (0, -0.7), (0.95, -0.15), (0.6, -1.25), (-0.6, -1.25)], who.hair)
        for eye in (self.look + 0.2,) if self.side else (-0.38, 0.38):
            if who.glasses:
                self.oval(eye, -0.05, 0.3, 0.17, GLASSES)
            else:
                self.oval(eye, -0.03, 0.13, 0.11, EYES)

    def hair(self) -> None:
        style, hair = self.who.hair_style, self.who.hair
        if style == "curly":
            for k in range(9):
                turn = math.pi * k / 8
                self.oval(1.05 * math.cos(turn) - self.look * 0.6, 0.25 + 0.85 * math.sin(turn), 0.55, 0.42, hair)
        if self.back:
            self.oval(0, 0.1, 1.06, 1.02, hair)
            if style == "long":
                self.soft([(-1.1, 0), (1.1, 0), (1.15, -2.3), (-1.15, -2.3)], hair)
        elif self.side:
            crown = [(-1.1, -0.4), (-1.15, 0.7), (0, 1.25), (1.15, 0.62)]
            self.soft([*crown, (0.5, 0.3), (0, 0.15), (-0.35, -0.55)], hair)
        else:
            self.soft(
                [(-1.15, -0.07), (-1.1, 1), (0, 1.3), (1.1, 1), (1.15, -0.07), (0.7, 0.55), (-0.7, 0.48)],
                hair,
            )
        behind = -1.1 if self.side else 0.0
        if style == "bun":
            self.oval(behind * 0.8, 1.05, 0.56, 0.4, hair)
        if style == "ponytail" and not self.front:
            self.sheet.limb(self.at(behind, 0.3), self.at(behind * 1.5, -1.75), 0.042, 0.022, hair, hair)

    def hat(self) -> None:
        kind, colour = self.who.headwear, self.who.headwear_colour
        if kind in ("cap", "beanie", "brim"):
            self.soft([(-1.2, 0.3), (-1.2, 1), (0, 1.45), (1.2, 1), (1.2, 0.3)], colour)
        if kind == "beanie":
            self.soft([(-1.2, 0.25), (-1.2, 0.6), (1.2, 0.6), (1.2, 0.25)], shaded(colour, 0.8))
        elif kind == "brim":
            self.oval(0, 0.42, 1.9, 0.25, colour)
        elif kind == "cap" and not self.back:
            start, tip = (0.0, 2.0) if self.side else (-1.05, 1.05)
            self.soft([(start, 0.42), (tip, 0.42), (tip, 0.2), (start, 0.2)], shaded(colour, 0.8))
