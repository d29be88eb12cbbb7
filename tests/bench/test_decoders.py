"""Decoders beside Pillow: `python -m mgn_deploy.bench.decoders`."""

from __future__ import annotations

import json
import sys

from mgn_deploy.bench import decoders
from mgn_deploy.datasets.drawn import draw_crop


def test_decoders_are_measured_and_their_pixels_compared(tmp_path, bundle_folder, monkeypatch, capsys):
    for number in range(3):
        draw_crop(number, 1, 0).save(tmp_path / f"{number}.jpg", quality=90)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    options = f"decoders --images {tmp_path} --bundle {bundle_folder} --enlarge 4 --rounds 2"
    monkeypatch.setattr(sys, "argv", options.split())
    decoders.main()
    result = json.loads(capsys.readouterr().out)
    assert result["pyvips"].startswith("not installed")
    assert result["equal_pixels"]["load_rgb"] == result["equal_pixels"]["torchvision"] == 3
    assert result["1 threads"]["torchvision"]["cpu"] > 0
    assert 0 < result["draft"]["moved_median"] <= result["draft"]["moved_worst"] < 0.1
