"""`mgn-deploy train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mgn_deploy.console import progress
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.train.trainer import Step


def train(
    data: str = typer.Option(
        ...,
        help="KIND:DIR; market1501, dukemtmc, cuhk03-labeled, cuhk03-detected, msmt17, or folder: any in Market's "
        "layout.",
    ),
    out: Path = typer.Option(..., "-o", "--out", help="The run's folder; a run that is there goes on."),
    recipe: str = typer.Option("paper", help="paper, strong, cpu, small, or a .toml file."),
    overrides: list[str] = typer.Option([], "--set", help="Override a key of the recipe: --set optim.lr=0.02."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
) -> None:
    """Train an MGN; run again it goes on where it stopped.

    For several GPUs: torchrun --nproc-per-node N -m mgn_deploy train ...
    """
    require_training()
    from mgn_deploy.datasets import open_data
    from mgn_deploy.train.recipe import load_recipe
    from mgn_deploy.train.trainer import WEIGHTS
    from mgn_deploy.train.trainer import train as run

    chosen = load_recipe(recipe, overrides)
    images = open_data(data, ("train", "query", "gallery"))
    with progress("batches") as bar:

        def report(step: Step) -> None:
            bar("training", (step.epoch - 1) * step.batches + step.batch, step.epochs * step.batches)

        run(images, chosen, out, device=device, on_step=report)  # type: ignore[arg-type]
    if os.environ.get("RANK", "0") == "0":
        print(out / WEIGHTS)
