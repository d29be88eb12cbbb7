"""Augmentation: each part alone, by what it does to a crop whose pixels are known."""

from __future__ import annotations

import numpy as np
import pytest

from mgn_deploy.train.data import ERASE_AREA, augment
from mgn_deploy.train.recipe import Augment

MEAN = np.array([124, 116, 104], np.uint8)
CROP = np.random.default_rng(0).integers(1, 100, (48, 16, 3), dtype=np.uint8)  # neither black nor MEAN


def changed(options: Augment, seed: int = 0) -> np.ndarray:
    before = CROP.copy()
    result = augment(CROP, options, MEAN, np.random.default_rng(seed))
    assert np.array_equal(CROP, before), "the input is left alone"
    assert (result.shape, result.dtype) == (CROP.shape, np.uint8)
    return result


def test_nothing_asked_for_changes_nothing():
    assert np.array_equal(changed(Augment(flip=0)), CROP)


def test_a_flip_mirrors_left_and_right():
    assert np.array_equal(changed(Augment(flip=1)), CROP[:, ::-1])


def test_half_of_the_images_are_flipped_by_default():
    flipped = [not np.array_equal(changed(Augment(), seed), CROP) for seed in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6


def test_padding_shifts_by_at_most_the_padding():
    places = set()
    for seed in range(300):
        result = changed(Augment(flip=0, pad=2), seed)
        padded = np.pad(CROP, ((2, 2), (2, 2), (0, 0)))
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(result, padded[top : top + 48, left : left + 16])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) == 25, "every place is reached"


def test_erasing_fills_one_rectangle_with_the_mean():
    shares = []
    for seed in range(200):
        erased = (changed(Augment(flip=0, erase=1), seed) == MEAN).all(axis=2)
        rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
        assert erased.sum() == len(rows) * len(columns)
        assert len(rows) == np.ptp(rows) + 1
        assert len(columns) == np.ptp(columns) + 1
        shares.append(erased.mean())
    assert min(shares) > 0
    assert max(shares) <= ERASE_AREA[1] * 1.1
    assert np.mean(shares) == pytest.approx(np.mean(ERASE_AREA), abs=0.06)
