"""Enrolling says where one image is two people's, and where two names differ in case only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgn_deploy.embedder import Embedder
from mgn_deploy.identity.enrol import enrol_images


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 32, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.parametrize(
    ("name", "image", "notes"),
    [
        ("Bob", 0, ["images of Bob that are enrolled as Anna too: 1; one name is wrong"]),
        ("ANNA", 1, ["ANNA and Anna, who is enrolled, are two people: names differ by case"]),
        ("Anna", 0, ["images that are Anna's already, or given twice: 1 of 1"]),
        ("Bob", 1, []),
    ],
)
def test_a_mix_up_is_noted(photos, tmp_path, embedder: Embedder, name, image, notes):
    enrol_images("Anna", photos[:1], tmp_path / "people", embedder)
    assert list(enrol_images(name, [photos[image]], tmp_path / "people", embedder).notes) == notes
