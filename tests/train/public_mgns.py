"""The MGNs of public repositories, written anew from descriptions of them: their module names, their order of
operations.

Nothing here uses `mgn_deploy.train.model`: what an importer makes is compared with these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

RESNET18 = (2, 2, 2, 2)
RESNET50 = (3, 4, 6, 3)


class InstanceBatch(nn.Module):
    """IBN-a as fast-reid names it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, maps: Tensor) -> Tensor:
        first, second = maps.chunk(2, dim=1)
        # Written out: per image and channel, with the biased variance.
        mean = first.mean((2, 3), keepdim=True)
        variance = first.var((2, 3), unbiased=False, keepdim=True)
        scaled = (first - mean) / (variance + 1e-5).sqrt()
        return torch.cat(
            [scaled * self.IN.weight.view(1, -1, 1, 1) + self.IN.bias.view(1, -1, 1, 1), self.BN(second)], 1
        )


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, planes: int, stride: int, ibn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = InstanceBatch(planes) if ibn else nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        if stride != 1 or inside != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
            )

    def forward(self, maps: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(maps)))
        out = functional.relu(self.bn2(self.conv2(out)))
        skip = self.downsample(maps) if hasattr(self, "downsample") else maps
        return functional.relu(self.bn3(self.conv3(out)) + skip)


class Basic(nn.Module):
    """The block of ResNet-18 and 34."""

    expansion = 1

    def __init__(self, inside: int, planes: int, stride: int, ibn: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = InstanceBatch(planes) if ibn else nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        if stride != 1 or inside != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inside, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, maps: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(maps)))))
        skip = self.downsample(maps) if hasattr(self, "downsample") else maps
        return functional.relu(out + skip)


Kind = type[Bottleneck] | type[Basic]


def stage(kind: Kind, inside: int, planes: int, blocks: int, stride: int, ibn: bool = False) -> nn.Sequential:
    first = kind(inside, planes, stride, ibn)
    return nn.Sequential(first, *(kind(kind.expansion * planes, planes, 1, ibn) for _ in range(blocks - 1)))


def backbone(
    width: int, blocks: tuple[int, ...], stem_pool: nn.Module, ibn: bool = False, kind: Kind = Bottleneck
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        stem_pool,
        stage(kind, width, width, blocks[0], 1, ibn),
        stage(kind, kind.expansion * width, 2 * width, blocks[1], 2, ibn),
        kind(2 * kind.expansion * width, 4 * width, 2, ibn),
    )


def branch(
    width: int, blocks: tuple[int, ...], stride: int, ibn: bool = False, kind: Kind = Bottleneck
) -> nn.Sequential:
    channels = 4 * kind.expansion * width
    rest = stage(kind, channels, 4 * width, blocks[2] - 1, 1, ibn)
    return nn.Sequential(rest, stage(kind, channels, 8 * width, blocks[3], stride))


class PowerMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        powers = maps.clamp(min=1e-6) ** self.p
        return (powers.sum((2, 3), keepdim=True) / (height * width)) ** (1 / self.p)


class Whole(nn.Module):
    """Maximum or mean of everything that comes in."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, maps: Tensor) -> Tensor:
        pool = functional.adaptive_max_pool2d if self.pooling == "max" else functional.adaptive_avg_pool2d
        return pool(maps, 1)


HEADS = ("b1", "b2", "b21", "b22", "b3", "b31", "b32", "b33")


class FastReid(nn.Module):
    """fast-reid's MGN; raw pixels of 0 to 255 in, features in its order out: b1 b2 b3 b21 b22 b31 b32 b33.

    generation 1: pool, convolution, norm, ReLU, bnneck; one pooling module for all. 3: EmbeddingHead, a pooling each.
    """

    def __init__(
        self,
        generation: int,
        width: int = 8,
        reduced: int = 6,
        *,
        pooling: str = "gem",
        stride: int = 1,
        ibn: bool = True,
        blocks: tuple[int, ...] = RESNET50,
        kind: Kind = Bottleneck,
        classes: int = 5,
        pixel_buffers: bool = True,
    ) -> None:
        super().__init__()
        if pixel_buffers:
            self.register_buffer("pixel_mean", torch.tensor([120.0, 115.0, 104.0]).view(1, 3, 1, 1))
            self.register_buffer("pixel_std", torch.tensor([58.0, 57.0, 57.5]).view(1, 3, 1, 1))
        stem = nn.MaxPool2d(3, 2, 1) if generation == 1 else nn.MaxPool2d(3, 2, ceil_mode=True)
        self.backbone = backbone(width, blocks, stem, ibn, kind)
        self.b1 = branch(width, blocks, stride, ibn, kind)
        self.b2 = branch(width, blocks, 1, ibn, kind)
        self.b3 = branch(width, blocks, 1, ibn, kind)
        self.generation = generation

        def pool() -> nn.Module:
            return PowerMean() if pooling == "gem" else Whole(pooling)

        shared = pool()
        for name in HEADS:
            head = nn.Module()
            convolution = nn.Conv2d(8 * kind.expansion * width, reduced, 1, bias=False)
            norm = nn.BatchNorm2d(reduced)
            if generation == 1:
                setattr(self, f"{name}_pool", nn.Sequential(shared, convolution, norm, nn.ReLU()))
                head.bnneck = nn.BatchNorm1d(reduced)
                head.classifier = nn.Linear(reduced, classes, bias=False)
            else:
                head.pool_layer = pool()
                head.bottleneck = nn.Sequential(convolution, norm)
                head.weight = nn.Parameter(torch.randn(classes, reduced))
            setattr(self, f"{name}_head", head)

    def reduced(self, name: str, maps: Tensor) -> Tensor:
        head = getattr(self, f"{name}_head")
        if self.generation == 1:
            return head.bnneck(getattr(self, f"{name}_pool")(maps)[:, :, 0, 0])
        return head.bottleneck(head.pool_layer(maps))[:, :, 0, 0]

    def forward(self, pixels: Tensor) -> Tensor:
        shared = self.backbone((pixels - self.pixel_mean) / self.pixel_std)
        one, two, three = self.b1(shared), self.b2(shared), self.b3(shared)
        regions = [("b1", one), ("b2", two), ("b3", three)]
        regions += zip(("b21", "b22"), two.chunk(2, dim=2), strict=True)
        regions += zip(("b31", "b32", "b33"), three.chunk(3, dim=2), strict=True)
        return torch.cat([self.reduced(name, maps) for name, maps in regions], dim=1)


class ThreeParts(nn.Module):
    """seathiefwang's, levyfan's and GNAYUOHZ's: `p1` to `p3`, numbered reductions or one for all, `fc_id_*`.

    Normalised pixels in; g1 g2 g3 p2_0 p2_1 p3_0 p3_1 p3_2 out, with `by_branch` (levyfan's `predict`)
    g1 g2 p2_0 p2_1 g3 p3_0 p3_1 p3_2. Windows are those of 384x128 only.
    """

    def __init__(
        self,
        backbone_name: str,
        pooling: str,
        width: int = 8,
        reduced: int = 6,
        *,
        shared_reduction: bool = False,
        wide_classifiers: bool = False,
        by_branch: bool = False,
        blocks: tuple[int, ...] = RESNET50,
        classes: int = 5,
    ) -> None:
        super().__init__()
        setattr(self, backbone_name, backbone(width, blocks, nn.MaxPool2d(3, 2, 1)))
        self.backbone_name, self.pooling, self.shared_reduction = backbone_name, pooling, shared_reduction
        self.by_branch = by_branch
        self.p1 = branch(width, blocks, 2)
        self.p2 = branch(width, blocks, 1)
        self.p3 = branch(width, blocks, 1)
        for name in ["reduction"] if shared_reduction else [f"reduction_{k}" for k in range(8)]:
            convolution, norm = nn.Conv2d(32 * width, reduced, 1, bias=False), nn.BatchNorm2d(reduced)
            setattr(self, name, nn.Sequential(convolution, norm, nn.ReLU()))
        for name in ("2048_0", "2048_1", "2048_2", "256_1_0", "256_1_1", "256_2_0", "256_2_1", "256_2_2"):
            inputs = 32 * width if wide_classifiers and name.startswith("2048") else reduced
            setattr(self, f"fc_id_{name}", nn.Linear(inputs, classes))

    def forward(self, images: Tensor) -> Tensor:
        pool = functional.max_pool2d if self.pooling == "max" else functional.avg_pool2d
        shared = getattr(self, self.backbone_name)(images)
        one, two, three = self.p1(shared), self.p2(shared), self.p3(shared)
        halves, thirds = pool(two, (12, 8)), pool(three, (8, 8))
        vectors = [pool(one, (12, 4)), pool(two, (24, 8)), pool(three, (24, 8))]
        vectors += [halves[:, :, 0:1], halves[:, :, 1:2], thirds[:, :, 0:1], thirds[:, :, 1:2], thirds[:, :, 2:3]]
        reductions = [getattr(self, "reduction" if self.shared_reduction else f"reduction_{k}") for k in range(8)]
        reduced = [reduce(v)[:, :, 0, 0] for reduce, v in zip(reductions, vectors, strict=True)]
        if self.by_branch:
            g1, g2, g3, *stripes = reduced
            reduced = [g1, g2, *stripes[:2], g3, *stripes[2:]]
        return torch.cat(reduced, dim=1)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor its own values, as of a trained network; the norms' scales of either sign."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".p"):
            parameter.data.uniform_(1.5, 4.5, generator=generator)
        elif parameter.ndim > 1:
            parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("weight"):
            parameter.data.uniform_(0.5, 1.5, generator=generator)
            parameter.data[::3] *= -1
        else:
            parameter.data.normal_(0, 0.3, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(1000)
    return model.eval()
