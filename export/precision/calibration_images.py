"""The images that INT8 is calibrated on: how many, which ones, and whether they will do."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from mgn_deploy.datasets.market1501 import parse_name
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.export.proof.proof import Pixels
from mgn_deploy.files import printable
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import list_images

_log = logging.getLogger("mgn_deploy")

COUNT = 500
FEW = 100
FEWEST = 10
# Of a channel's pixels, in levels of 255: below it the image shows nothing (it is black, or of one colour).
LEAST_SPREAD = 2.0


def read_calibration_images(
    folder: str | os.PathLike[str],
    height: int,
    width: int,
    proof_crops: np.ndarray,
    *,
    count: int = COUNT,
) -> Pixels:
    """At most `count` images below a folder, the same at each call: drawn at random, from every camera as many where
    the names tell it, and in random order.

    Args:
        folder: searched recursively.
        height, width: of the model's input, in pixels.
        proof_crops: what the bundle is proven on, uint8 `[m, height, width, 3]`: a set that looks otherwise is warned
            of.
        count: images wanted.

    Raises:
        UserError: fewer than 10 readable images that show something.
    """
    rng = np.random.default_rng(0)
    crops: list[np.ndarray] = []
    blank = 0
    for path in _by_cameras_in_turn([file.path for file in list_images(folder) if file.path], rng):
        if len(crops) == count:
            break
        try:
            crop = read_crop(path, height, width)
        except UnreadableImage:
            continue  # the number of images is said and written down
        if crop.std(axis=(0, 1)).max() < LEAST_SPREAD:
            blank += 1
        else:
            crops.append(crop)
    if len(crops) < FEWEST:
        raise UserError(
            f"{folder} has {len(crops)} readable images that show something ({blank} are of one colour): INT8 is "
            f"calibrated on at least {FEWEST}, better {COUNT}, like those that it will see (--calib DIR)"
        )
    pixels = np.stack([crops[index] for index in rng.permutation(len(crops))])
    if blank:
        _log.warning(f"{blank} calibration images of one colour are left out")
    if len(pixels) < FEW:
        _log.warning(f"{len(pixels)} calibration images are few: give {COUNT} if you can")
    difference = _looks_unlike(pixels, proof_crops)
    if difference:
        _log.warning(
            f"the calibration images look unlike the proof images ({difference}): calibrate on images like yours"
        )
    return Pixels(pixels, printable(os.path.basename(os.path.abspath(folder))))


def _by_cameras_in_turn(paths: list[Path], rng: np.random.Generator) -> Iterator[Path]:
    cameras: dict[int, list[Path]] = {}
    for index in rng.permutation(len(paths)):
        label = parse_name(paths[index].name)
        cameras.setdefault(label.camera if label else -1, []).append(paths[index])
    turns = zip_longest(*(cameras[camera] for camera in sorted(cameras)))
    return (path for path in chain.from_iterable(turns) if path is not None)


def _looks_unlike(crops: np.ndarray, others: np.ndarray) -> str:
    """What differs between two sets of pixels, in words; empty where nothing much does."""
    brightness, other = crops.mean(), others.mean()
    contrast, other_contrast = crops.std(), others.std()
    if abs(brightness - other) > 0.75 * other_contrast:
        return f"mean brightness {brightness:.0f} and {other:.0f} of 255"
    if not 0.5 < contrast / max(other_contrast, 1e-9) < 2:
        return f"contrast {contrast:.0f} and {other_contrast:.0f}"
    return ""
