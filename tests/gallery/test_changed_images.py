"""An image that changes after it was embedded is named by the run that embeds it again."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery.embed import embed_folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        draw(folder, number, seed=number)
    return folder


def draw(folder: Path, number: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_changed_image_is_counted_and_named(photos: Path, tmp_path: Path, embedder: Embedder, caplog):
    embed_folder(photos, tmp_path / "store", embedder)
    draw(photos, 1, seed=99)
    with caplog.at_level(logging.WARNING, "mgn_deploy"):
        report = embed_folder(photos, tmp_path / "store", embedder)
    assert (report.embedded, report.changed, report.unchanged) == (1, 1, 2)
    assert "'1.png'" in caplog.text


def test_a_new_image_is_not_a_changed_one(photos: Path, tmp_path: Path, embedder: Embedder, caplog):
    embed_folder(photos, tmp_path / "store", embedder)
    draw(photos, 3, seed=3)
    report = embed_folder(photos, tmp_path / "store", embedder)
    assert (report.embedded, report.changed) == (1, 0)
    assert "'3.png'" not in caplog.text
