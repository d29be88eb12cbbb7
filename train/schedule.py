"""The optimizers and learning rates of the recipes (the paper's: section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import nn

from mgn_deploy.train.recipe import Optim, Schedule


def make_optimizer(model: nn.Module, options: Optim) -> torch.optim.Optimizer:
    """Make SGD with momentum (the paper's) or Adam, over every parameter."""
    if options.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    return torch.optim.Adam(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)


def rate_factor(schedule: Schedule, done: float) -> float:
    """Return what the learning rate is multiplied by when the share `done` (0 to 1) of the run is over."""
    if done < schedule.warm_up:
        return max(0.01, done / schedule.warm_up)
    if schedule.kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (done - schedule.warm_up) / (1 - schedule.warm_up)))
    epoch = done * schedule.epochs + 1e-9  # 40/80 * 80 must not be 39.999
    return schedule.gamma ** sum(epoch >= step for step in schedule.steps)
