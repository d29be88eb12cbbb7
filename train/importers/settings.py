"""The config of a checkpoint's model: what its tensors tell, what the user said, and what is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgn_deploy.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.source import Source
from mgn_deploy.train.model import GEM_POWER

# Blocks of layer1 to layer4, and whether a block has three convolutions.
BACKBONES = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
OPTIONS = {"pooling": "--pool", "global_stride": "--global-stride", "stem_pool": "--stem-pool"}
SIZE = (384, 128)
ROWS = 96  # 16 rows of pixels are one of the map; 2 and 3 stripes must be whole rows of it


@dataclass(frozen=True)
class Assumption:
    """A property of the model that no tensor tells, the value that is assumed, and the option that changes it."""

    what: str
    value: Any
    option: str


def settings(
    source: Source, tensors: dict[str, Tensor], given: dict[str, Any]
) -> tuple[ModelConfig, dict[str, Any], list[Assumption]]:
    """Work out the model's config, what of it was read from the tensors, and what was assumed.

    Args:
        source: whose code wrote the checkpoint.
        tensors: by the source's names.
        given: what the user said of `pooling`, `global_stride`, `stem_pool` and `size`.

    Raises:
        UserError: a part that decides this is missing or is none of ours, or how it pools is told by nothing.
    """
    network = {
        "backbone": _backbone(source, tensors),
        "base_width": _filters(tensors, f"{source.backbone}.0.weight"),
        "reduced_width": _filters(tensors, source.theirs("branches.0.reductions.0.0.weight")),
        "ibn": "a" if f"{source.backbone}.4.0.bn1.IN.weight" in tensors else "none",
        "neck": source.neck,
    }
    read: dict[str, Any] = dict(network)
    height, width = given.get("size", SIZE)
    if height % ROWS:
        raise UserError(
            f"--size {height}x{width}: the height must be a multiple of {ROWS}, or this code's stripes are not ours"
        )
    assumed = [] if "size" in given else [Assumption("input size", f"{height}x{width}", "--size")]
    powers = [tensors[name] for name in source.powers if name in tensors]
    if powers:
        if given.get("pooling", "gem") != "gem":
            raise UserError(f"--pool {given['pooling']}: it holds the powers of a generalised mean, which is gem")
        read |= {"pooling": "gem", "powers": [round(float(power.mean()), 4) for power in powers]}
        given = {**given, "pooling": "gem"}
    choices = {name: given.get(name, getattr(source, name)) for name in OPTIONS}
    if choices["pooling"] is None:
        raise UserError(f"{source.title}, and how it pools cannot be told from it: give --pool max, avg or gem")
    for name, option in OPTIONS.items():
        if name not in given:
            assumed.append(Assumption(name.replace("_", " "), choices[name], option))
    if choices["pooling"] == "gem" and not powers:
        assumed.append(Assumption("power of the generalised mean", GEM_POWER, "--pool"))
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if source.pixels and all(name in tensors for name in source.pixels):
        mean, std = (_pixel_values(tensors, name) for name in source.pixels)
        read |= {"mean": list(mean), "std": list(std)}
        if min(std) <= 0:
            raise UserError(f"{source.pixels[1]} is not positive")
    elif source.pixels:
        assumed.append(Assumption("mean and deviation of pixels", "ImageNet's", "mean and std in config.json"))
    config = ModelConfig.checked(**network, height=height, width=width, mean=mean, std=std, **choices)
    return config, read, assumed


def _backbone(source: Source, tensors: dict[str, Tensor]) -> str:
    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})

    trunk, branch = source.backbone, f"{source.branch}1"
    blocks = (count(f"{trunk}.4."), count(f"{trunk}.5."), 1 + count(f"{branch}.0."), count(f"{branch}.1."))
    three = f"{trunk}.4.0.conv3.weight" in tensors
    kind = (*blocks, three)
    if kind not in BACKBONES:
        raise UserError(
            f"{source.title} with {blocks} blocks of {3 if three else 2} convolutions in layer1 to layer4, which is no "
            "ResNet-18, 34, 50, 101 or 152"
        )
    return BACKBONES[kind]


def _filters(tensors: dict[str, Tensor], name: str) -> int:
    if name not in tensors:
        raise UserError(f"lacks {name}")
    if tensors[name].ndim != 4:
        raise UserError(f"{name} has shape {list(tensors[name].shape)} where a convolution has four sizes")
    return len(tensors[name])


def _pixel_values(tensors: dict[str, Tensor], name: str) -> tuple[float, float, float]:
    """Scale three numbers of 0 to 255 to 0 to 1, rounded to what float32 keeps of them."""
    values = [round(value / 255, 7) for value in tensors[name].flatten().tolist()]
    if len(values) != 3:
        raise UserError(f"{name} has {len(values)} values, not one a colour")
    return values[0], values[1], values[2]
