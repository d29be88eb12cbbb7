"""A small MGN and pixels for it."""

from __future__ import annotations

import torch
from torch import nn

from mgn_deploy.config import ModelConfig

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine

TINY = ModelConfig(backbone="resnet18", base_width=8, reduced_width=4, height=96, width=32)


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**{**TINY.model_dump(), **changes})


def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
