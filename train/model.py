"""The Multiple Granularity Network (Wang et al., "Learning Discriminative Features with Multiple Granularities for
Person Re-Identification", ACM MM 2018), sections 3.1 and 4.1, Table 1.

    image -> stem, layer1, layer2, layer3[0] -+-> layer3[1:], layer4 (stride 2) -> whole map             Global
                                              +-> layer3[1:], layer4 (stride 1) -> whole map + 2 stripes Part-2
                                              +-> layer3[1:], layer4 (stride 1) -> whole map + 3 stripes Part-3
    each pooled vector -> its own 1x1 conv, batch norm, ReLU -> concatenated in the order of the branches, global first

What public checkpoints do otherwise (strides, pooling, what follows the norm) is in the config; the default is the
paper's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from mgn_deploy.choices import Neck, Pooling
from mgn_deploy.config import GEM_EPSILON, ModelConfig, features_of, stripe_rows
from mgn_deploy.train.resnet import IBN, build_resnet

GEM_POWER = 3.0  # Radenovic et al. 2019, section 3.2: where training starts, and what a fixed GeM uses


@dataclass
class MGNOutput:
    """What the losses take (section 3.2).

    `pooled_globals`: z_g of each branch, before reduction, `[n, C]` each: softmax loss.
    `globals`: f_g of each branch, reduced, `[n, reduced_width]` each: triplet loss.
    `stripes`: f_p of every stripe, reduced, `[n, reduced_width]` each: softmax loss.
    `logits`: of the classifiers over `pooled_globals`, then over `stripes`, `[n, num_classes]` each; none without
    classes.
    """

    pooled_globals: list[Tensor]
    globals: list[Tensor]
    stripes: list[Tensor]
    logits: list[Tensor]


class Reduction(nn.Sequential):
    """1x1 convolution without bias, batch norm, and as the neck says ReLU, nothing, or ReLU and a batch norm:
    `[n, C, 1, 1]` -> `[n, reduced_width, 1, 1]`."""

    def __init__(self, channels: int, reduced_width: int, neck: Neck = "relu") -> None:
        conv = nn.Conv2d(channels, reduced_width, 1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
        rest: list[nn.Module] = [] if neck == "linear" else [nn.ReLU()]
        if neck == "relu_norm":
            rest.append(nn.BatchNorm2d(reduced_width))
        super().__init__(conv, nn.BatchNorm2d(reduced_width), *rest)


def stripe_pool(
    feature_map: Tensor, stripes: int, pooling: Pooling = "max", powers: Tensor | None = None
) -> list[Tensor]:
    """Pool a map `[n, C, H, W]`: the whole of it, then (for more than one) each stripe; `[n, C, 1, 1]` each.

    `tests/emulator/reference.py` is the definition. This is PyTorch's, for training and for what is traced: the whole
    map is not sliced, as the slice would be an operator of the graph. `powers`, for "gem", is one a region.
    """
    regions = [feature_map]
    if stripes > 1:
        regions += [feature_map[:, :, first:last] for first, last in stripe_rows(feature_map.shape[2], stripes)]
    if pooling == "max":
        return [region.amax((2, 3), keepdim=True) for region in regions]
    if pooling == "avg":
        return [region.mean((2, 3), keepdim=True) for region in regions]
    assert powers is not None
    return [
        region.clamp(min=GEM_EPSILON).pow(power).mean((2, 3), keepdim=True).pow(1 / power)
        for region, power in zip(regions, powers, strict=True)
    ]


class Branch(nn.Module):
    """One branch after the shared trunk: its own layer3[1:] and layer4, and a reduction for every pooled vector."""

    reductions: Any  # ModuleList of Reduction; torch types the items of one as plain Module

    def __init__(self, resnet: ResNet, stripes: int, config: ModelConfig) -> None:
        super().__init__()
        self.stripes = stripes
        self.pooling = config.pooling
        self.layer3 = copy.deepcopy(resnet.layer3[1:])
        self.layer4 = copy.deepcopy(resnet.layer4)
        if stripes > 1 or config.global_stride == 1:
            for module in self.layer4[0].modules():  # whichever convolution strides, and the downsample's
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        features = features_of(stripes)
        if config.pooling == "gem":
            self.powers = nn.Parameter(torch.full((features,), GEM_POWER))
        channels = resnet.fc.in_features  # of the last map: 2048 for ResNet-50, 512 for ResNet-18
        self.reductions = nn.ModuleList(Reduction(channels, config.reduced_width, config.neck) for _ in range(features))

    def feature_map(self, shared: Tensor) -> Tensor:
        """`[n, C3, h, w]` -> `[n, C4, h/2, w/2]` for a global branch of stride 2, `[n, C4, h, w]` for the others."""
        return self.layer4(self.layer3(shared))

    def pool(self, feature_map: Tensor) -> list[Tensor]:
        """The whole map, then each stripe, pooled: `[n, C, 1, 1]` each."""
        powers = self.powers if self.pooling == "gem" else None
        return stripe_pool(feature_map, self.stripes, self.pooling, powers)

    def reduce(self, pooled: list[Tensor]) -> list[Tensor]:
        """One reduced vector `[n, reduced_width]` for each pooled one."""
        return [reduction(vector).flatten(1) for reduction, vector in zip(self.reductions, pooled, strict=True)]


class MGN(nn.Module):
    """Normalised RGB float `[n, 3, height, width]` -> the embedding `[n, dim]` in eval mode, `MGNOutput` in training.

    Args:
        config: which ResNet, which branches, how wide.
        resnet: a torchvision ResNet whose weights the trunk and every branch start from; random weights without it.
    """

    branches: Any  # ModuleList of Branch
    classifiers: Any  # ModuleList of Linear

    def __init__(self, config: ModelConfig, resnet: ResNet | None = None) -> None:
        super().__init__()
        self.config = config
        resnet = build_resnet(config) if resnet is None else resnet
        self.trunk = nn.Sequential(
            resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2, resnet.layer3[0]
        )
        self.branches = nn.ModuleList(Branch(resnet, stripes, config) for stripes in config.branches)
        parts = sum(stripes for stripes in config.branches if stripes > 1)
        widths = [resnet.fc.in_features] * len(config.branches) + [config.reduced_width] * parts
        # Equation 1 is a softmax over W^T f alone: no bias.
        self.classifiers = nn.ModuleList(
            nn.Linear(width, config.num_classes, bias=False) for width in widths if config.num_classes
        )
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.001)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Return the last map of each branch: `[n, C, 12, 4]`, `[n, C, 24, 8]`, `[n, C, 24, 8]` for the paper's MGN."""
        shared = self.trunk(images)
        return [branch.feature_map(shared) for branch in self.branches]

    def forward(self, images: Tensor) -> Tensor | MGNOutput:
        pooled = [branch.pool(map_) for branch, map_ in zip(self.branches, self.feature_maps(images), strict=True)]
        reduced = [branch.reduce(vectors) for branch, vectors in zip(self.branches, pooled, strict=True)]
        if not self.training:
            return torch.cat([vector for branch in reduced for vector in branch], dim=1)
        pooled_globals = [branch[0].flatten(1) for branch in pooled]
        stripes = [vector for branch in reduced for vector in branch[1:]]
        logits = [
            classifier(vector) for classifier, vector in zip(self.classifiers, pooled_globals + stripes, strict=False)
        ]
        return MGNOutput(pooled_globals, [branch[0] for branch in reduced], stripes, logits)


class Embedding(nn.Module):
    """What every engine must compute, in PyTorch: uint8 RGB `[n, height, width, 3]` -> unit float32 rows `[n, dim]`.

    It scales and normalises, averages the features of each image and of its mirror (section 4.1; not with
    `flip=False`), and divides by the L2 norm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: MGN, flip: bool = True) -> None:
        super().__init__()
        self.model = model.eval()
        self.flip = flip
        self.register_buffer("mean", torch.tensor(model.config.mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(model.config.std).view(1, 3, 1, 1) * 255)

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 `[n, h, w, 3]` into float32 `[n, 3, h, w]`; for the mirror average `[2n, ...]`, mirrors last."""
        pixels = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        return torch.cat([pixels, pixels.flip(3)]) if self.flip else pixels

    def forward(self, images: Tensor) -> Tensor:
        features = self.model(self.normalise(images))
        if self.flip:
            features = (features[: len(images)] + features[len(images) :]) / 2
        return nn.functional.normalize(features.float(), dim=1)


def fold_batch_norms(model: MGN) -> MGN:
    """Copy a model, in eval mode, with its batch norms folded into the convolutions before them (Identity is left).

    Of an IBN only the half that is a batch norm can be. A neck's second norm stays: it comes after the ReLU.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
            elif isinstance(conv, nn.Conv2d) and isinstance(norm, IBN):
                setattr(module, conv_name, _fold_second_half(conv, norm))
                norm.BN = nn.Identity()
    return folded


def head_numbers(folded: MGN) -> dict[str, Tensor]:
    """The heads' numbers of a model with folded norms: weight `[F, R, C]` and bias `[F, R]`; where it has them powers
    `[F]`, and the second norm's scale and shift `[F, R]`."""
    reductions = [reduction for branch in folded.branches for reduction in branch.reductions]
    numbers = {
        "weight": torch.stack([reduction[0].weight.flatten(1) for reduction in reductions]),
        "bias": torch.stack([reduction[0].bias for reduction in reductions]),
    }
    if folded.config.pooling == "gem":
        numbers["powers"] = torch.cat([branch.powers for branch in folded.branches])
    if folded.config.neck == "relu_norm":
        norms = [reduction[3] for reduction in reductions]
        scales = [norm.weight / torch.sqrt(norm.running_var + norm.eps) for norm in norms]
        shifts = [norm.bias - norm.running_mean * scale for norm, scale in zip(norms, scales, strict=True)]
        numbers |= {"scale": torch.stack(scales), "shift": torch.stack(shifts)}
    return {name: tensor.detach() for name, tensor in numbers.items()}


def _fold_second_half(conv: nn.Conv2d, norm: IBN) -> nn.Conv2d:
    """Fold an IBN's batch norm into the last channels of the convolution before it; the others' bias is zero."""
    weight, bias = nn.utils.fusion.fuse_conv_bn_weights(
        conv.weight[norm.first :],
        None,
        norm.BN.running_mean,
        norm.BN.running_var,
        norm.BN.eps,
        norm.BN.weight,
        norm.BN.bias,
    )
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(torch.cat([conv.weight[: norm.first], weight]))
    folded.bias = nn.Parameter(torch.cat([bias.new_zeros(norm.first), bias]))
    return folded
