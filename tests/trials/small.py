"""The very small model that trials run, and a recipe that trains one in seconds."""

from __future__ import annotations

from pathlib import Path

RECIPE = """
[model]
backbone = "resnet18"
base_width = 16
branches = [1, 2]
reduced_width = 16
height = 96
width = 32
init = "random"
[batch]
identities = 6
images = 2
[optim]
name = "adam"
lr = 2e-3
[schedule]
epochs = 4
kind = "cosine"
warm_up = 0.1
[loss]
margin = 1.2
"""


def export_small(weights: Path, bundle: Path) -> None:
    """Write a weights folder of a small MGN and its proven bundle."""
    from mgn_deploy.config import ModelConfig
    from mgn_deploy.export.exporter import ExportOptions, export_bundle
    from mgn_deploy.train.weights import add_noise, new_model, save_weights

    config = ModelConfig(backbone="resnet18", base_width=16, reduced_width=16, branches=(1, 2), height=96, width=32)
    model = new_model(config, seed=1)
    add_noise(model)
    save_weights(model, weights)
    export_bundle(weights, bundle, ExportOptions(flip=False))
