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


def test_labels_that_none_leaves_in_the_store_are_said(photos: Path, tmp_path: Path, embedder: Embedder, caplog):
    (photos / "labels.csv").write_text("path,identity,camera\n0.png,7,1\n")
    embed_folder(photos, tmp_path / "store", embedder, labels=photos / "labels.csv")
    caplog.clear()
    embed_folder(photos, tmp_path / "store", embedder, labels="none")
    assert "1 images of the store keep the identity or camera" in caplog.text
