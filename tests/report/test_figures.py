"""Figures: what is drawn, looked at pixel by pixel, and sentences for what cannot be drawn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mgn_deploy
from made_up_people import calibrated
from matplotlib.colors import to_rgb
from PIL import Image

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.report.figures import draw_attention, draw_curves
from mgn_deploy.train.attention import attention_maps
from mgn_deploy.train.model import Embedding
from mgn_deploy.train.weights import load_weights


def share(png: Path, colour: str) -> float:
    """Of the figure's pixels, how many have the colour."""
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    wanted = np.round(255 * np.array(to_rgb(colour)))
    return float((np.abs(pixels - wanted) <= 3).all(axis=2).mean())


@pytest.fixture
def files(crops) -> list[Path]:
    return sorted(path for path in crops.rglob("*.jpg"))


def test_an_attention_map_is_strongest_where_the_branch_s_last_map_is(weights, files):
    model = load_weights(weights)
    crops = np.stack([read_crop(file, 96, 32) for file in files[:3]])
    maps = attention_maps(model, crops)
    assert (maps.shape, maps.dtype) == ((3, 3, 96, 32), np.float32)
    assert maps.min(axis=(2, 3)) == pytest.approx(0)
    assert maps.max(axis=(2, 3)) == pytest.approx(1)
    with torch.inference_mode():
        features = model.feature_maps(Embedding(model, flip=False).normalise(torch.from_numpy(crops)))
    for branch, feature_map in enumerate(features):
        strength = feature_map.square().sum(1).sqrt().numpy()
        height, width = strength.shape[1:]
        for image in range(3):
            row, column = np.unravel_index(strength[image].argmax(), strength[image].shape)
            cell = maps[image, branch].reshape(height, 96 // height, width, 32 // width)[row, :, column]
            assert cell.max() == pytest.approx(1, abs=0.02)


def test_attention_draws_a_row_an_image(weights, files, tmp_path):
    out = tmp_path / "attention.png"
    done = mgn_deploy("figures", "attention", weights, *files[:2], "-o", out)
    assert (done.exit_code, done.stdout) == (0, f"{out}\n"), done.stderr
    two = Image.open(out).size
    assert mgn_deploy("figures", "attention", weights, files[0].parent, "-o", out, "--limit", 4).exit_code == 0
    assert Image.open(out).size[0] == two[0]
    assert Image.open(out).size[1] > 1.7 * two[1]


def test_the_map_is_drawn_over_the_crop(tmp_path):
    crops = np.full((1, 96, 32, 3), 255, np.uint8)
    maps = np.zeros((1, 1, 96, 32), np.float32)
    maps[0, 0, 48:] = 1
    draw_attention(crops, maps, ["bytes\udcff\n.jpg"], ["global"], tmp_path / "a.png")
    # Half of jet's ends over white: #000080 and #800000.
    assert share(tmp_path / "a.png", "#8080c0") == pytest.approx(share(tmp_path / "a.png", "#c08080"), rel=0.1)
    assert share(tmp_path / "a.png", "#8080c0") > 0.1


def test_curves_are_drawn_also_before_the_first_evaluation(tmp_path):
    header = "epoch,seconds,lr,loss,softmax,triplet,images_per_second,rank-1,mAP\n"
    (tmp_path / "epochs.csv").write_text(header)
    done = mgn_deploy("figures", "curves", tmp_path, "-o", tmp_path / "c.png")
    assert done.exit_code == 2
    assert "no finished epoch" in done.stderr
    assert not (tmp_path / "c.png").exists()
    (tmp_path / "epochs.csv").write_text(header + "1,5.0,0.01,8,6,2,60,,\n2,9.0,0.01,7,5,2,60,0.5,0.4\n")
    assert mgn_deploy("figures", "curves", tmp_path, "-o", tmp_path / "c.png").exit_code == 0
    assert share(tmp_path / "c.png", "C0") > 0.001
    with_map = share(tmp_path / "c.png", "C1")
    (tmp_path / "epochs.csv").write_text(header + "1,5.0,0.01,8,6,2,60,,\n2,9.0,0.01,7,5,2,60,0.5,\n")
    assert mgn_deploy("figures", "curves", tmp_path, "-o", tmp_path / "c.png").exit_code == 0
    assert share(tmp_path / "c.png", "C1") < with_map


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (b"a,b\n1,2\n", "has to name the columns epoch, lr, loss"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"epoch,lr,loss,softmax,triplet\n1,0.1,many,1,1\n", "could not convert string to float: 'many'"),
    ],
)
def test_a_table_of_something_else_is_one_sentence(table, sentence, tmp_path):
    (tmp_path / "epochs.csv").write_bytes(table)
    with pytest.raises(UserError, match=sentence):
        draw_curves(tmp_path, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_a_calibration_is_drawn_and_a_bundle_without_one_says_how_to_get_one(bundle_folder, tmp_path):
    bundle, png = Bundle.open(shutil.copytree(bundle_folder, tmp_path / "bundle")), tmp_path / "c.png"
    done = mgn_deploy("figures", "calibration", "--bundle", bundle.folder, "-o", png)
    assert (done.exit_code, png.exists()) == (2, False)
    assert "has no calibration.json: `mgn-deploy calibrate" in done.stderr
    calibrated(30, bundle_id=bundle.id).write(bundle)
    assert mgn_deploy("figures", "calibration", "--bundle", bundle.folder, "-o", png).exit_code == 0
    assert min(share(png, colour) for colour in ("C0", "C1", "C2")) > 0.0005  # pairs, means over 2 and 4 images


def test_matplotlib_leaves_nothing_in_the_home_but_in_our_cache(tmp_path):
    """In a process of its own: matplotlib makes its folders once."""
    (tmp_path / "epochs.csv").write_text("epoch,lr,loss,softmax,triplet,rank-1,mAP\n1,0.01,8,6,2,,\n")
    (tmp_path / "home").mkdir()
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    script = "from mgn_deploy.report.figures import draw_curves; draw_curves('.', 'c.png')"
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**variables, "HOME": str(tmp_path / "home")}, check=True
    )
    assert os.listdir(tmp_path / "home") == [".cache"]
    assert os.listdir(tmp_path / "home/.cache") == ["mgn-deploy"]


@pytest.mark.parametrize("arguments", [("curves", "none"), ("attention", "none", "x.jpg")])
def test_what_is_not_there_is_one_sentence(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = mgn_deploy("figures", *arguments)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
