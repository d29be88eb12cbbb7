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
from pathlib import Path

import torch
from torch import Tensor

from mgn_deploy.choices import Device
from mgn_deploy.datasets import Dataset
from mgn_deploy.errors import UserError
from mgn_deploy.interrupt import DeferredInterrupt, Stopped
from mgn_deploy.progress import Progress
from mgn_deploy.train.distributed import Group
from mgn_deploy.train.evaluate import evaluate_model
from mgn_deploy.train.losses import mgn_loss
from mgn_deploy.train.memory import explained_memory
from mgn_deploy.train.model import MGN
from mgn_deploy.train.prepare import prepare
from mgn_deploy.train.recipe import Recipe
from mgn_deploy.train.run import BEST, OnStep, Run, Step
from mgn_deploy.train.weights import save_weights

_log = logging.getLogger("mgn_deploy")

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    data: Dataset | Callable[[], Dataset],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    device: Device = "auto",
    evaluate: bool = True,
    allow_data_change: bool = False,
    on_step: OnStep = lambda step: None,
    progress: Progress | None = None,
) -> MGN:
    """Train an MGN, or go on with the run that `out` holds; under `torchrun`, on every rank's device.

    Writes `out/weights` (the last), `out/best` (of the highest mAP), `out/last.pt` (the state), `out/epochs.csv` and
    `out/tensorboard`. On Ctrl-C, SIGTERM or SIGHUP the state is saved before KeyboardInterrupt is raised. Rank 0
    logs what the data are and, after each epoch, its losses, pace and accuracy. State and weights are saved before
    anything else that an epoch ends with; an evaluation that fails is a warning.

    Args:
        data: `train` is trained on; `query` and `gallery`, where there are any, are ranked every `loop.evaluate_every`
            epochs. Or a function that opens it, which rank 0 alone calls.
        recipe: see `train/recipe.py`.
        out: the run's folder.
        device: where to train.
        evaluate: whether `query` and `gallery` are wanted.
        allow_data_change: whether a run may go on with other training images.
        on_step: called after every batch, on rank 0. It gets a `Step` and not the three values of `Progress`, because
            a caller who plots losses or stops a run early needs the losses.
        progress: called while files are checked and while query and gallery are embedded, on rank 0.

    Returns:
        The model after the last step, in eval mode.

    Raises:
        UserError: unusable data, a run of another recipe or other data (the message says which), a model or batch that
            does not fit the memory, or a loss that is not finite (the message names the step).
    """
    with Group(device) as group, explained_memory():
        prepared = group.first_does(
            lambda: prepare(data() if callable(data) else data, recipe.batch, evaluate, progress)
        )
        with DeferredInterrupt() as interrupt:
            run = _Loop(prepared, recipe, Path(out), group, allow_data_change, interrupt, on_step, progress)
            if run.at.row:
                run.end_epoch(run.at.row)
            while not run.over():
                run.epoch()
            return run.finish()


class _Loop(Run):
    """A run that is trained."""

    images_here = 0
    seconds_left = 0.0  # as of the last batch

    def epoch(self) -> None:
        """Train for the rest of the epoch that the run is in, and end it.

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
                parameters["lr"] = recipe.optim.lr * recipe.schedule.rate_factor(share)
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
            if whole_step and (stop := int(self.group.agree(self.interrupt.wanted))):
                self.save()
                raise Stopped(stop)
        if at.batch:
            self.end_epoch(self._row(images / (time.monotonic() - start)))

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
        pace = self.images_here / (time.monotonic() - self.start)
        left = (1 - share) * schedule.epochs * batches * images / pace
        if schedule.max_seconds:
            left = min(left, schedule.max_seconds - self.seconds())
        self.seconds_left = max(0.0, left)
        self.on_step(Step(at.epoch + 1, schedule.epochs, at.batch, batches, *losses, pace, self.seconds_left))

    def _row(self, images_per_second: float) -> dict[str, float]:
        """Go to the next epoch, and return what the log is to say of this one."""
        at = self.at
        means = [total / at.batch for total in at.losses]
        at.epoch, at.batch, at.losses = at.epoch + 1, 0, [0.0, 0.0, 0.0]
        if self.group.is_first:
            _log.info(
                f"epoch {at.epoch:3d}/{self.recipe.schedule.epochs}  loss {means[0]:.3f} (softmax {means[1]:.3f}, "
                f"triplet {means[2]:.3f})  {images_per_second:.1f} images/s, {self.seconds_left / 60:.1f} min left"
            )
        return {
            "epoch": at.epoch,
            "seconds": round(self.seconds(), 2),
            "lr": self.optimizer.param_groups[0]["lr"],
            **dict(zip(("loss", "softmax", "triplet"), means, strict=True)),
            "images_per_second": images_per_second,
        }

    def end_epoch(self, row: dict[str, float]) -> None:
        """Save the state and, after the last epoch, the weights; then evaluate, and log the row.

        The row is in the state until it is logged: a run that is killed in between logs it when it goes on.
        """
        over, self.at.row = self.over(), row
        self.save()
        if not self.log:
            self.at.row = None
            return
        if over:
            self.write_weights()
        evaluated = self.data.query and (over or self.at.epoch % self.recipe.loop.evaluate_every == 0)
        self.log.write(row | (self._evaluate() if evaluated else {}))
        self.at.row = None
        if evaluated:
            self.save()

    def _evaluate(self) -> dict[str, float]:
        """Rank the held-out people, and keep the weights if they are the best so far."""

        def tell(step: str, done: int, total: int) -> None:
            if self.interrupt.wanted:
                raise Stopped(self.interrupt.wanted)  # all is saved
            if self.progress:
                self.progress(step, done, total)

        try:
            metrics = evaluate_model(self.model, self.data, progress=tell)
        except Exception as error:  # whatever it is, memory included: training is worth more than a figure
            _log.warning(f"epoch {self.at.epoch} is not evaluated: {str(error) or type(error).__name__}")
            return {}
        _log.info(f"epoch {self.at.epoch:3d}  rank-1 {100 * metrics.rank[1]:.2f}%, mAP {100 * metrics.mAP:.2f}%")
        if metrics.mAP > self.at.best_map:
            self.at.best_map = metrics.mAP
            save_weights(self.model, self.out / BEST)
        return {"rank-1": metrics.rank[1], "mAP": metrics.mAP}
