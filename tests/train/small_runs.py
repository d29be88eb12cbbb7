"""Runs of a tiny MGN on drawn people, for the tests of training."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgn_deploy.datasets import Dataset
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.train.recipe import load_recipe
from mgn_deploy.train.run import WEIGHTS, Step
from mgn_deploy.train.trainer import train

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


TINY = ("model.base_width=8", "model.reduced_width=8", "batch.identities=2", "batch.images=2", "schedule.warm_up=0.0")

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def draw_people(root: Path) -> Dataset:
    """Five people to train on, and three others."""
    draw_market1501(root, train_identities=5, test_identities=3)
    return open_market1501(root)


def run(people: Dataset, out: Path, *settings: str, **options: Any) -> list[Step]:
    steps: list[Step] = []
    train(people, load_recipe("small", [*TINY, *settings]), out, device="cpu", on_step=steps.append, **options)
    return steps


def tensors(out: Path, which: str = WEIGHTS) -> dict[str, torch.Tensor]:
    return load_file(out / which / "mgn.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


def command(people: Dataset, out: Path, *settings: str) -> list[str]:
    arguments = [sys.executable, "-m", "mgn_deploy", "train", "--data", f"market1501:{people.root}", "-o", str(out)]
    overrides = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return [*arguments, "--recipe", "small", "--device", "cpu", *overrides]


def stop_in_step(number: int, people: Dataset, out: Path, *settings: str) -> None:
    """A run that gets Ctrl-C in its step `number`, counted from 1."""
    steps: list[Step] = []

    def count(step: Step) -> None:
        steps.append(step)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(people, load_recipe("small", [*TINY, *settings]), out, device="cpu", on_step=count)
