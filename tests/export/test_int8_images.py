"""The images that INT8 is calibrated on, and the exports of each precision by the command line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import mgn_deploy
from PIL import Image

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.precision.calibration_images import read_calibration_images
from mgn_deploy.images.decode import read_crop


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))])


# The images


def test_the_same_images_are_drawn_each_time_and_from_every_camera_alike(crops, tmp_path, pixels, said):
    shutil.copytree(crops / "camera 1", tmp_path / "1")
    (tmp_path / "2").mkdir()
    for path in sorted((crops / "camera 2").iterdir())[:6]:
        shutil.copy(path, tmp_path / "2")
    first = read_calibration_images(tmp_path, 96, 32, pixels, count=12)
    again = read_calibration_images(tmp_path, 96, 32, pixels, count=12)
    assert np.array_equal(first.crops, again.crops)
    assert len(first.crops) == 12
    seconds = [read_crop(path, 96, 32).tobytes() for path in (tmp_path / "2").iterdir()]
    assert sum(crop.tobytes() in seconds for crop in first.crops) == 6
    assert "few" in said[0]


def test_broken_images_are_left_out(crops, tmp_path, pixels):
    folder = tmp_path / "images"
    shutil.copytree(crops, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    assert len(read_calibration_images(folder, 96, 32, pixels).crops) == 40


def test_nothing_to_calibrate_on_is_refused(tmp_path, pixels):
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(UserError):
        read_calibration_images(tmp_path, 96, 32, pixels)
    for number in range(20):
        Image.new("RGB", (32, 96)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"has 0 readable images that show something \(20 are of one colour\)"):
        read_calibration_images(tmp_path, 96, 32, pixels)


def test_few_readable_images_are_refused(crops, tmp_path, pixels):
    for path in sorted(crops.rglob("*.jpg"))[:9]:
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=r"has 9 readable images .*: INT8 is calibrated on at least 10"):
        read_calibration_images(tmp_path, 96, 32, pixels)


def test_images_of_one_colour_are_left_out_however_many_they_are(crops, tmp_path, pixels, said):
    """Few pictures among them would pass for a set with contrast."""
    for path in sorted(crops.rglob("*.jpg"))[:10]:
        shutil.copy(path, tmp_path)
    for number in range(30):
        Image.new("RGB", (32, 96), (number, 0, 0)).save(tmp_path / f"{number}.png")
    images = read_calibration_images(tmp_path, 96, 32, pixels)
    assert len(images.crops) == 10
    assert "30 calibration images of one colour are left out" in said


def test_images_that_look_unlike_the_proof_s_are_warned_of(crops, pixels, said):
    read_calibration_images(crops, 96, 32, pixels)
    assert not any("unlike" in warning for warning in said)
    read_calibration_images(crops, 96, 32, (pixels // 16 + 235).astype(np.uint8))
    assert any("look unlike the proof images (mean brightness" in warning for warning in said)


# The command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "engine", "proven"),
    [
        ("fp16", "openvino", {"openvino", "onnxruntime"}),
        ("bf16", "openvino", {"openvino"}),
        ("int8", "openvino", {"openvino"}),
        ("int8", "onnxruntime", {"onnxruntime"}),
        ("int8", "tensorrt-rtx", {"onnxruntime"}),
    ],
)
def test_export_in_each_precision(weights, crops, tmp_path, precision, engine, proven, embedder):
    out = tmp_path / "b"
    arguments = ("export", weights, "-o", out, "--precision", precision, "--proof-images", crops, "--json")
    if precision == "int8":
        arguments += ("--engine", engine, "--calib", crops, "--max-drop", 100)
    done = mgn_deploy(*arguments)
    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)["proofs"]) == proven
    bundle = Bundle.open(out)
    assert bundle.manifest.precision == precision
    assert bundle.id != embedder.bundle.id
    quantisation = bundle.manifest.quantisation
    if precision == "int8":
        assert (quantisation.engine, quantisation.images, quantisation.drop_of) == (engine, 40, "top-10 agreement")
        assert (out / "graph.onnx").stat().st_size < 0.5 * (embedder.bundle.folder / "graph.onnx").stat().st_size
    else:
        assert quantisation is None
    paths = sorted(crops.rglob("*.jpg"))[:8]
    expected = embedder.embed(paths)
    found = Embedder.open(out).embed(paths)
    assert (found * expected).sum(axis=1).min() > (0.98 if precision == "int8" else 0.9999)
    with pytest.raises(CannotRun, match="no proof for torch"):
        Embedder.open(out, "torch")
    Embedder.open_reference(out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--precision", "int4"), "'int4' is not one of"),
        (("--precision", "int8"), "INT8 needs images to calibrate on: --calib DIR"),
        (("--precision", "int8", "--calib", "none"), "none"),
        (("--precision", "int8", "--calib", ".", "--max-drop", "nan"), "--max-drop nan: points are from 0 to 100"),
        (("--precision", "int8", "--calib", ".", "--max-drop", "inf"), "--max-drop inf: points are from 0 to 100"),
        (("--max-drop", "1"), "--max-drop is about INT8"),
        (("--calib", "."), "--calib is of no use to fp32"),
        (
            ("--precision", "int8", "--calib", ".", "--engine", "tflite"),
            "'tflite' is not one of",
        ),
    ],
)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(weights, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = mgn_deploy("export", weights, "-o", "b", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
