"""The images that an export is proven on."""

from __future__ import annotations

import os
import shutil

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.export.precision.calibration_images import read_calibration_images
from mgn_deploy.export.proof.proof import FEWEST_IMAGES, MOST_IMAGES, proof_crops
from mgn_deploy.export.proof.prove import proof_pixels


def test_too_few_images_are_refused(crops, tmp_path):
    for path in sorted(crops.rglob("*.jpg"))[: FEWEST_IMAGES - 1]:
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=r"has 11 readable images: a proof needs at least 12"):
        proof_crops(tmp_path, 96, 32)


def test_unreadable_images_count_for_nothing_and_are_counted(crops, tmp_path, said):
    for path in sorted(crops.rglob("*.jpg"))[:FEWEST_IMAGES]:
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert proof_crops(tmp_path, 96, 32).shape == (12, 96, 32, 3)
    assert f"1 of the 13 images of {tmp_path} to prove on cannot be read" in said


def test_of_many_images_it_takes_some_from_everywhere(crops, tmp_path):
    source = next(crops.rglob("*.jpg"))
    for number in range(2 * MOST_IMAGES + 10):
        os.link(source, tmp_path / f"{number:04d}.jpg")
    assert len(proof_crops(tmp_path, 32, 16)) == (2 * MOST_IMAGES + 10 + 2) // 3


def test_a_folder_whose_name_is_not_utf8_is_named_as_json_can_hold_it(crops, tmp_path):
    folder = shutil.copytree(crops, tmp_path / os.fsdecode(b"caf\xe9"))
    pixels = proof_pixels(folder, 96, 32)
    assert pixels.source == "caf\\xe9"
    assert read_calibration_images(folder, 96, 32, pixels.crops).source == "caf\\xe9"


def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        proof_crops(tmp_path / "nowhere", 96, 32)
