"""Augmentation of decoded crops, uint8 in and out (the mirror: section 4.1; the rest is of later recipes)."""

from __future__ import annotations

import math

import numpy as np

from mgn_deploy.train.recipe import Augment

# Random erasing as published (Zhong et al. 2017): share of the area and aspect ratio of the rectangle.
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = (0.3, 1 / 0.3)


def augment(crop: np.ndarray, options: Augment, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror, pad and crop, erase.

    Args:
        crop: RGB uint8 `[height, width, 3]`.
        options: how often and how much.
        mean: uint8 `[3]`, what erased rectangles are filled with: zero once normalised.
        rng: gives the same number of values whatever happens.

    Returns:
        A new array of the crop's shape and type.
    """
    mirror, shift, erase, rectangle = rng.random(), rng.random(2), rng.random(), rng.random(4)
    crop = crop[:, ::-1].copy() if mirror < options.flip else crop.copy()
    height, width = crop.shape[:2]
    if options.pad:
        padded = np.zeros((height + 2 * options.pad, width + 2 * options.pad, 3), np.uint8)
        padded[options.pad : options.pad + height, options.pad : options.pad + width] = crop
        top, left = (int(value * (2 * options.pad + 1)) for value in shift)
        crop = padded[top : top + height, left : left + width].copy()
    if erase < options.erase:
        area = height * width * (ERASE_AREA[0] + rectangle[0] * (ERASE_AREA[1] - ERASE_AREA[0]))
        aspect = math.exp(
            math.log(ERASE_ASPECT[0]) + rectangle[1] * (math.log(ERASE_ASPECT[1]) - math.log(ERASE_ASPECT[0]))
        )
        tall, wide = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
        top, left = int(rectangle[2] * (height - tall + 1)), int(rectangle[3] * (width - wide + 1))
        crop[top : top + tall, left : left + wide] = mean
    return crop
