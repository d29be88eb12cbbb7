"""torchvision's ResNets as an MGN needs them: of any width, with IBN-a, with either alignment of the stem's pooling."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError

PUBLISHED_WIDTH = 64


class IBN(nn.Module):
    """IBN-a (Pan et al., "Two at Once", ECCV 2018): instance norm on the first half of the channels, batch norm on the
    others; maps `[n, C, h, w]` in and out."""

    IN: nn.InstanceNorm2d
    BN: Any  # BatchNorm2d; Identity once it is folded

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = channels // 2
        self.IN = nn.InstanceNorm2d(self.first, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.first)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([self.IN(maps[:, : self.first]), self.BN(maps[:, self.first :])], dim=1)


def build_resnet(config: ModelConfig) -> ResNet:
    """Make the ResNet, with random weights, that an MGN of this config starts from.

    Another `base_width` than 64 scales the channels of every stage.

    Raises:
        UserError: torchvision has no ResNet of that name, or none of that width.
    """
    name, base_width = config.backbone, config.base_width
    if not name.startswith(("resnet", "resnext", "wide_resnet")) or name not in torchvision.models.list_models():
        known = [model for model in torchvision.models.list_models(torchvision.models) if "resne" in model]
        raise UserError(f"backbone {name!r} is none of torchvision's ResNets: choose one of {', '.join(known)}")
    resnet = torchvision.models.get_model(name, weights=None)
    if base_width != PUBLISHED_WIDTH:
        least = PUBLISHED_WIDTH // resnet.base_width  # one channel for each of a ResNeXt's groups
        if base_width < least:
            raise UserError(f"base_width {base_width}: a {name} takes {least} or more")
        _scale_width(resnet, base_width)
    if config.ibn == "a":
        for block in (*resnet.layer1, *resnet.layer2, *resnet.layer3):
            block.bn1 = IBN(block.bn1.num_features)
    if config.stem_pool == "ceil":
        resnet.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    return resnet


def _scale_width(resnet: ResNet, base_width: int) -> None:
    """Make every stage again with its channels scaled by base_width / 64, initialised as torchvision does."""
    block = type(resnet.layer1[0])
    resnet.inplanes = base_width
    resnet.conv1 = nn.Conv2d(3, base_width, 7, stride=2, padding=3, bias=False)
    resnet.bn1 = nn.BatchNorm2d(base_width)
    for stage in range(4):
        name = f"layer{stage + 1}"
        blocks = len(getattr(resnet, name))
        setattr(resnet, name, resnet._make_layer(block, base_width << stage, blocks, stride=1 if stage == 0 else 2))
    resnet.fc = nn.Linear((base_width << 3) * block.expansion, 1000)
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
