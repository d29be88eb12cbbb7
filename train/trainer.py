"""The training loop.

    each epoch: P x K batches (sampler) -> decoded and augmented on threads (data) -> MGN -> losses -> optimizer
    after each: a row of the log and a checkpoint; every N epochs the project's own ranking on people held out

All randomness is a function of (seed, epoch, batch), so a run that is killed and started again ends with the same bits.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgn_deploy.choices import Device
from mgn_deploy.datasets import Dataset
from mgn_deploy.errors import UserError
from mgn_deploy.interrupt import DeferredInterrupt, Stopped
from mgn_deploy.train.checkpoint import load_checkpoint, save_checkpoint
from mgn_deploy.train.data import TrainingSet
from mgn_deploy.train.distributed import Group
from mgn_deploy.train.evaluate import evaluate_model
from mgn_deploy.train.log import RunLog
from mgn_deploy.train.losses import mgn_loss
from mgn_deploy.train.model import MGN, Embedding
from mgn_deploy.train.recipe import Recipe
from mgn_deploy.train.sampler import IdentitySampler
from mgn_deploy.train.schedule import make_optimizer, rate_factor
from mgn_deploy.train.weights import fine_tuned_model, new_model, save_weights

_log = logging.getLogger("mgn_deploy")

WEIGHTS, BEST = "weights", "best"
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """One batch that is done, number `batch` of `batches` in `epoch` of `epochs`, counted from 1.

    `loss`, `softmax` and `triplet` are this batch's, of rank 0; `images_per_second` is over all ranks since this start
    of the run, and `seconds_left` is until the run's end at that pace.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    softmax: float
    triplet: float
    images_per_second: float
    seconds_left: float


OnStep = Callable[[Step], None]


def train(
    data: Dataset,
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    device: Device = "auto",
    on_step: OnStep = lambda step: None,
) -> MGN:
    """Train an MGN, or go on with the run that `out` holds; under `torchrun`, on every rank's device.

    Writes `out/weights` (the last), `out/best` (of the highest mAP), `out/last.pt` (the state), `out/epochs.csv` and
    `out/tensorboard`. On Ctrl-C, SIGTERM or SIGHUP the state is saved before KeyboardInterrupt is raised. Rank 0
    logs what the data are and, after each epoch, its losses, pace and accuracy.

    Args:
        data: `train` is trained on; `query` and `gallery`, where there are any, are ranked every `loop.evaluate_every`
            epochs.
        recipe: see `train/recipe.py`.
        out: the run's folder.
        device: where to train.
        on_step: called after every batch, on rank 0. It gets a `Step` and not the three values of `Progress`, because
            a caller who plots losses or stops a run early needs the losses.

    Returns:
        The model after the last step, in eval mode.

    Raises:
        UserError: unusable data, a run of another recipe, or a loss that is not finite (the message names the step).
    """
    with Group(device) as group, DeferredInterrupt() as interrupt:
        if group.is_first:
            _log.info(
                f"{len(data.train)} training images, {len(data.query)} queries, {len(data.gallery)} gallery images of "
                f"{data.root}"
            )
        run = _Run(data, recipe, Path(out), group, on_step)
        while not run.over():
            run.epoch(interrupt)
        return run.finish()


class _Run:
    """The parts of a run, and where it is (`at`)."""

    def __init__(self, data: Dataset, recipe: Recipe, out: Path, group: Group, on_step: OnStep) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.data, self.recipe, self.out, self.group, self.on_step = data, recipe, out, group, on_step
        self.model = _first_model(recipe, len({image.identity for image in data.train})).to(group.device)
        config = self.model.config
        self.training = TrainingSet(data.train, config.height, config.width, config.mean)
        self.sampler = IdentitySampler(
            self.training.classes,
            recipe.batch.identities,
            recipe.batch.images,
            seed=recipe.loop.seed,
            rank=group.rank,
            ranks=group.ranks,
        )
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, recipe.optim)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.loop.amp == "fp16")
        # A run goes on only with what it was started with.
        self.fingerprint = (
            f"{recipe.model_dump_json()} {len(data.train)} images of {config.num_classes}, {group.ranks} ranks"
        )
        self.at = load_checkpoint(out, self.fingerprint, self.model, self.optimizer, self.scaler)
        if (self.at.epoch or self.at.batch) and group.is_first:
            _log.info(f"{out} goes on after epoch {self.at.epoch}, batch {self.at.batch}")
        self.network: nn.Module = DistributedDataParallel(self.model) if group.ranks > 1 else self.model
        if recipe.loop.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        self.normalise = Embedding(self.model, flip=False).to(group.device).normalise
        self.log = RunLog(out, self.at.epoch) if group.is_first else None
        self.started, self.earlier, self.images_here = time.monotonic(), self.at.seconds, 0
        self.seconds_left = 0.0  # as of the last batch

    def seconds(self) -> float:
        """Return the time trained, over all starts of the run."""
        return self.earlier + time.monotonic() - self.started

    def share(self) -> float:
        """Return how much of the run is done, 0 to 1, by batches or by the time limit, whichever is further."""
        schedule, batches = self.recipe.schedule, len(self.sampler)
        share = (self.at.epoch * batches + self.at.batch) / (schedule.epochs * batches)
        if schedule.max_seconds:
            share = max(share, self.group.agree(self.seconds() / schedule.max_seconds))
        return share

    def over(self) -> bool:
        """Tell whether all epochs are done, or the time."""
        return self.at.epoch >= self.recipe.schedule.epochs or self.share() >= 1

    def epoch(self, interrupt: DeferredInterrupt) -> None:
        """Train for the rest of the epoch that the run is in, log it, and save the state.

        Raises:
            Stopped: by a signal; the state is saved.
        """
        at, recipe = self.at, self.recipe
        start, images = time.monotonic(), 0
        self.model.train()
        seed = (recipe.loop.seed, at.epoch, self.group.rank)
        for crops, classes in self.training.batches(self.sampler.epoch(at.epoch), recipe.augment, seed, first=at.batch):
            share = self.share()
            if share >= 1:
                break
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = recipe.optim.lr * rate_factor(recipe.schedule, share)
            losses = self._forward_backward(crops, classes)
            at.batch += 1
            whole_step = at.batch % recipe.batch.accumulate == 0 or at.batch == len(self.sampler)
            if whole_step:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)
            at.losses = [total + one for total, one in zip(at.losses, losses, strict=True)]
            images += len(crops) * self.group.ranks
            self._report(losses, len(crops) * self.group.ranks, share)
            if whole_step and (stop := int(self.group.agree(interrupt.wanted))):
                self._save()
                raise Stopped(stop)
        if at.batch:
            self._end_epoch(images / (time.monotonic() - start))

    def _forward_backward(self, crops: Tensor, classes: Tensor) -> tuple[float, float, float]:
        """Add a batch's gradients, and return its loss, softmax and triplet."""
        device, loop = self.group.device, self.recipe.loop
        images = self.normalise(crops.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, AMP[loop.amp], enabled=loop.amp != "off"):
            output = self.network(images)
        loss, parts = mgn_loss(output, classes.to(device), self.recipe.loss)
        losses = (loss.item(), parts["softmax"].item(), parts["triplet"].item())
        if not math.isfinite(losses[0]):
            raise UserError(
                f"the loss is {losses[0]} in epoch {self.at.epoch + 1}, batch {self.at.batch + 1}: lower optim.lr "
                f"({self.recipe.optim.lr}), or use loop.amp=bf16 instead of fp16"
            )
        self.scaler.scale(loss / self.recipe.batch.accumulate).backward()
        return losses

    def _report(self, losses: tuple[float, float, float], images: int, share: float) -> None:
        self.images_here += images
        if not self.group.is_first:
            return
        at, schedule, batches = self.at, self.recipe.schedule, len(self.sampler)
        pace = self.images_here / (time.monotonic() - self.started)
        left = (1 - share) * schedule.epochs * batches * images / pace
        if schedule.max_seconds:
            left = min(left, schedule.max_seconds - self.seconds())
        self.seconds_left = max(0.0, left)
        self.on_step(Step(at.epoch + 1, schedule.epochs, at.batch, batches, *losses, pace, self.seconds_left))

    def _end_epoch(self, images_per_second: float) -> None:
        at = self.at
        means = [total / at.batch for total in at.losses]
        at.epoch, at.batch, at.losses = at.epoch + 1, 0, [0.0, 0.0, 0.0]
        row: dict[str, float] = {
            "epoch": at.epoch,
            "seconds": round(self.seconds(), 2),
            "lr": self.optimizer.param_groups[0]["lr"],
            **dict(zip(("loss", "softmax", "triplet"), means, strict=True)),
            "images_per_second": images_per_second,
        }
        wanted = self.over() or at.epoch % self.recipe.loop.evaluate_every == 0
        if self.log:
            _log.info(
                f"epoch {at.epoch:3d}/{self.recipe.schedule.epochs}  loss {means[0]:.3f} (softmax {means[1]:.3f}, "
                f"triplet {means[2]:.3f})  {images_per_second:.1f} images/s, {self.seconds_left / 60:.1f} min left"
            )
            if self.data.query and wanted:
                row |= self._evaluate()
            self.log.write(row)
        self._save()

    def _evaluate(self) -> dict[str, float]:
        """Rank the held-out people, and keep the weights if they are the best so far."""
        metrics = evaluate_model(self.model, self.data)
        _log.info(f"epoch {self.at.epoch:3d}  rank-1 {100 * metrics.rank[1]:.2f}%, mAP {100 * metrics.mAP:.2f}%")
        if metrics.mAP > self.at.best_map:
            self.at.best_map = metrics.mAP
            save_weights(self.model, self.out / BEST)
        return {"rank-1": metrics.rank[1], "mAP": metrics.mAP}

    def _save(self) -> None:
        self.at.seconds = self.seconds()
        if self.group.is_first:
            save_checkpoint(self.out, self.fingerprint, self.model, self.optimizer, self.scaler, self.at)

    def finish(self) -> MGN:
        """Write the last weights."""
        if self.log:
            self.log.close()
            save_weights(self.model, self.out / WEIGHTS)
        return self.model.eval()


def _first_model(recipe: Recipe, num_classes: int) -> MGN:
    """Make the network that a run starts from."""
    table, seed = recipe.model, recipe.loop.seed
    if Path(table.init).is_dir():
        return fine_tuned_model(table.init, num_classes, table.height, table.width, seed)
    return new_model(table.config(num_classes), table.init, seed)
