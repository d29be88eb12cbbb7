"""`mgn-deploy train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import Device
from mgn_deploy.cli.options import Data, Json, out
from mgn_deploy.console import is_first_process, print_result, progress
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    from mgn_deploy.datasets import Dataset
    from mgn_deploy.train.run import Step


def train(
    data: Data,
    run: Annotated[Path, out("The run's folder; a run that is there goes on.")],
    recipe: Annotated[str, typer.Option(help="paper, strong, cpu, small, or a .toml file.")] = "paper",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the recipe: --set optim.lr=0.02.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--init",
            help="Fine-tune: a weights folder; or random, imagenet, or the file of a ResNet's state dict (model.init).",
        ),
    ] = None,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="Rank no query and gallery on the way.")] = False,
    allow_data_change: Annotated[
        bool, typer.Option("--allow-data-change", help="Go on with other training images than the run had.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to train; auto: on a GPU where there is one.")] = "auto",
    json: Json = False,
) -> None:
    """Train an MGN; run again, it goes on where it stopped.

    For several GPUs: torchrun --nproc-per-node N -m mgn_deploy train ...
    """
    require_training()
    from mgn_deploy.train.log import CSV
    from mgn_deploy.train.prepare import open_training_data
    from mgn_deploy.train.recipe import load_recipe
    from mgn_deploy.train.run import BEST, WEIGHTS
    from mgn_deploy.train.trainer import train as train_model

    chosen = load_recipe(recipe, overrides or (), start)
    with progress("batches") as bar:

        def report(step: Step) -> None:
            bar("training", (step.epoch - 1) * step.batches + step.batch, step.epochs * step.batches)

        notes: list[str] = []

        def read() -> Dataset:
            opened = open_training_data(data, not no_evaluate)
            notes.extend(opened.notes)
            return opened

        model = train_model(
            read,
            chosen,
            run,
            device=device,
            evaluate=not no_evaluate,
            allow_data_change=allow_data_change,
            on_step=report,
            progress=bar,
        )
    if not is_first_process():
        return
    best = str(run / BEST) if (run / BEST).is_dir() else None
    made = {
        "weights": str(run / WEIGHTS), "best": best, "log": str(run / CSV), "notes": notes,
        "identities": model.config.num_classes, "model": model.config.model_dump(mode="json"),
    }  # fmt: skip
    print_result(json, made, run / WEIGHTS)
