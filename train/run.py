"""The parts of a run: made from a recipe, or as its folder's `last.pt` holds them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import first_names
from mgn_deploy.interrupt import DeferredInterrupt
from mgn_deploy.progress import Progress
from mgn_deploy.train.checkpoint import Position, State, load_checkpoint, restore, save_checkpoint
from mgn_deploy.train.data import BATCHES_AHEAD, TrainingSet
from mgn_deploy.train.distributed import Group
from mgn_deploy.train.log import RunLog
from mgn_deploy.train.memory import require_memory
from mgn_deploy.train.model import MGN, Embedding
from mgn_deploy.train.prepare import Prepared
from mgn_deploy.train.recipe import Optim, Recipe
from mgn_deploy.train.sampler import IdentitySampler
from mgn_deploy.train.started import Started, require_same
from mgn_deploy.train.weights import TENSORS, fine_tuned_model, new_model, save_weights

_log = logging.getLogger("mgn_deploy")

WEIGHTS, BEST = "weights", "best"


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


class Run:
    """Model, data, optimizer and log of a run, where it is (`at`), who stops it and who is told of it."""

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        out: Path,
        group: Group,
        allow_data_change: bool,
        interrupt: DeferredInterrupt,
        on_step: OnStep,
        progress: Progress | None,
    ) -> None:
        """Start a run, or take up the one that `out` holds.

        Raises:
            UserError: a damaged state, one of another recipe or of other images, or what the run is to start from
                cannot be read.
        """
        out.mkdir(parents=True, exist_ok=True)
        self.data, self.recipe, self.out, self.group = prepared.data, recipe, out, group
        self.interrupt, self.on_step, self.progress = interrupt, on_step, progress
        num_classes = len(prepared.people)
        state = load_checkpoint(out)
        if state:  # whose tensors the model gets below
            model = new_model(ModelConfig.checked(**{**state.started.model, "num_classes": num_classes}))
        else:
            model = _first_model(recipe, num_classes)
        self.started = Started.of(recipe, model.config, group.ranks, prepared)
        if state:
            require_same(out, state.started, self.started, allow_data_change)
        if group.device.type == "cpu":
            require_memory(_bytes(model, recipe))
        self.model = model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.training = TrainingSet(self.data.train, model.config.height, model.config.width, model.config.mean)
        batch, seed = recipe.batch, recipe.loop.seed
        self.sampler = IdentitySampler(
            self.training.classes, batch.identities, batch.images, seed=seed, rank=group.rank, ranks=group.ranks
        )
        self.optimizer = _optimizer(self.model, recipe.optim)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=recipe.loop.amp == "fp16")
        self.at = self._restored(state) if state else Position()
        self.network: nn.Module = DistributedDataParallel(self.model) if group.ranks > 1 else self.model
        if recipe.loop.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        self.normalise = Embedding(self.model, flip=False).to(group.device).normalise
        self.log = RunLog(out, self.at.epoch - bool(self.at.row)) if group.is_first else None
        self.start, self.earlier = time.monotonic(), self.at.seconds
        self.written = -1  # after which epoch `weights` was written

    def seconds(self) -> float:
        """Return the time trained, over all starts of the run."""
        return self.earlier + time.monotonic() - self.start

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

    def save(self) -> None:
        """Write the state, on rank 0."""
        self.at.seconds = self.seconds()
        if self.group.is_first:
            model, optimizer, scaler = (part.state_dict() for part in (self.model, self.optimizer, self.scaler))
            save_checkpoint(self.out, State(self.started, model, optimizer, scaler, self.at))

    def write_weights(self) -> None:
        """Write the weights as they are, on rank 0, unless that is done."""
        if self.group.is_first and self.written != self.at.epoch:
            save_weights(self.model, self.out / WEIGHTS)
            self.written = self.at.epoch

    def finish(self) -> MGN:
        """Write the last weights and close the log."""
        self.write_weights()
        if self.log:
            self.log.close()
        return self.model.eval()

    def _restored(self, state: State) -> Position:
        restore(state, self.started.people, self.model, self.optimizer, self.scaler)
        at, epochs = state.position, self.recipe.schedule.epochs
        if state.started.evaluation != self.started.evaluation:
            at.best_map = -1.0  # of other queries: no figure to compare with
        if self.group.is_first:
            _log.info(f"{self.out} goes on after epoch {at.epoch}, batch {at.batch}")
            if at.epoch >= epochs:
                _log.info(f"all {epochs} epochs are done: more are trained with a larger schedule.epochs")
        return at


def _first_model(recipe: Recipe, num_classes: int) -> MGN:
    """Make the network that a run starts from."""
    table, seed, init = recipe.model, recipe.loop.seed, Path(recipe.model.init)
    if init.is_dir() or init.name == TENSORS:
        model = fine_tuned_model(init, num_classes, table.height, table.width, seed)
        own = model.config.model_dump()
        other = [key for key, value in table if key != "init" and value != own[key]]
        if other:
            _log.info(
                f"{first_names([f'model.{key} is {own[key]}' for key in other])}: as in {init}, not as in the recipe"
            )
        return model
    return new_model(table.config(num_classes), init, seed)


def _optimizer(model: nn.Module, options: Optim) -> torch.optim.Optimizer:
    if options.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    return torch.optim.Adam(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)


def _bytes(model: MGN, recipe: Recipe) -> int:
    """Bound from below the bytes that training takes on a CPU."""
    config, batch = model.config, recipe.batch
    copies = 3 if recipe.optim.name == "sgd" else 4  # weights, gradients, momentum or Adam's two
    pixels = batch.identities * batch.images * config.height * config.width
    # uint8 batches ahead, a float32 one, and what the stem's convolution and norm keep of it at half its size
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return copies * weights + pixels * (3 * BATCHES_AHEAD + 12 + 2 * config.base_width)
