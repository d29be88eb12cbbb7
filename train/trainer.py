"""The loop: P x K batches, random flips, the paper's losses, a learning rate that warms up and decays by cosine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from mgn_deploy.train.data import IdentitySampler, TrainingSet
from mgn_deploy.train.losses import mgn_loss
from mgn_deploy.train.model import MGN, Embedding, MGNOutput

from mgn_deploy.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Adam with a linear warm-up and a cosine decay to zero over `seconds` of wall time or `epochs`, whichever ends first."""

    epochs: int
    seconds: float = math.inf
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    warm_up: float = 0.1  # share of the run
    identities_per_batch: int = 16
    images_per_identity: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """Of one batch: how far the run is (0 to 1), the losses, images/s since the start."""

    epoch: int
    last_of_epoch: bool
    done: float
    loss: float
    softmax: float
    triplet: float
    images_per_second: float


def fit(model: MGN, data: TrainingSet, schedule: Schedule, on_step: Callable[[Step], None] = lambda step: None) -> None:
    """Train the model in place, on the device where its weights are; leaves it in eval mode.

    Raises:
        UserError: the model has other classes than the data, or the loss stops being finite (the message names the step).
    """
    if model.config.num_classes != data.num_classes:
        raise UserError(f"the model has {model.config.num_classes} classes and the data {data.num_classes} identities")
    rng = np.random.default_rng(schedule.seed)
    sampler = IdentitySampler(data.classes, schedule.identities_per_batch, schedule.images_per_identity)
    device = next(model.parameters()).device
    normalise = Embedding(model, flip=False).to(device).normalise
    model.train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    start = time.monotonic()
    steps = images = 0
    for epoch in range(schedule.epochs):
        for number, indices in enumerate(sampler.epoch(rng)):
            done = max((time.monotonic() - start) / schedule.seconds, steps / (schedule.epochs * len(sampler)))
            if done >= 1:
                model.eval()
                return
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * _factor(done, schedule.warm_up)
            crops, classes = data.batch(indices, rng.random(len(indices)) < 0.5)
            output = model(normalise(crops.to(device)).contiguous(memory_format=torch.channels_last))
            assert isinstance(output, MGNOutput)
            loss, parts = mgn_loss(output, classes.to(device))
            if not torch.isfinite(loss):
                model.eval()
                raise UserError(f"the loss is {loss.item()} at step {steps} (epoch {epoch}): lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            steps, images = steps + 1, images + len(indices)
            on_step(
                Step(
                    epoch,
                    number == len(sampler) - 1,
                    done,
                    loss.item(),
                    parts["softmax"],
                    parts["triplet"],
                    images / (time.monotonic() - start),
                )
            )
    model.eval()


def _factor(done: float, warm_up: float) -> float:
    if done < warm_up:
        return (done + 0.01) / (warm_up + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
