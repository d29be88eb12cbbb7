"""What an MGN is: the few numbers that training, export and every engine must agree on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

Ibn = Literal["none", "a"]
StemPool = Literal["padded", "ceil"]
Pooling = Literal["max", "avg", "gem"]
Neck = Literal["relu", "linear", "relu_norm"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GEM_EPSILON = 1e-6  # the least value that a generalised mean takes, as in fast-reid


class ModelConfig(BaseModel):
    """Architecture and input of one MGN (Wang et al. 2018, sections 3.1 and 4.1; defaults are the paper's).

    `backbone` is a torchvision ResNet; `base_width` is the channels of its stem, 64 as published, fewer for a network that a
    CPU trains in minutes. `branches` holds each branch's number of stripes: 1 is the global branch, N > 1 pools N stripes
    beside the whole map.

    The last five fields are what public checkpoints have otherwise than the paper (`train/importers`):

    - `ibn`: "a" puts instance norm on half the channels of each block's first norm in layer1 to layer3 (Pan et al. 2018).
    - `stem_pool`: windows of the stem's 3x3 maximum start one row above even rows ("padded") or at them ("ceil").
    - `global_stride`: of layer4 in branches of one stripe; 1 keeps their maps as large as the other branches'.
    - `pooling`: of whole maps and stripes; "gem" is the generalised mean (mean of x^p)^(1/p) with one p a feature.
    - `neck`: what follows a reduction's convolution and norm: ReLU, nothing, or ReLU and another norm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str = "resnet50"
    base_width: int = Field(64, ge=8, le=256, multiple_of=8)
    branches: tuple[int, ...] = (1, 2, 3)
    reduced_width: int = Field(256, ge=1, le=8192)
    height: int = Field(384, ge=32, le=4096)
    width: int = Field(128, ge=16, le=4096)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_classes: int = Field(0, ge=0)
    ibn: Ibn = "none"
    stem_pool: StemPool = "padded"
    global_stride: Literal[1, 2] = 2
    pooling: Pooling = "max"
    neck: Neck = "relu"

    @field_validator("branches")
    @classmethod
    def _branches(cls, branches: tuple[int, ...]) -> tuple[int, ...]:
        if not branches or not all(1 <= stripes <= 8 for stripes in branches):
            raise ValueError("branches needs one number of stripes (1 to 8) a branch, e.g. 1,2,3")
        return branches

    @model_serializer(mode="wrap")
    def _without_the_papers_choices(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The last five fields are written only where they differ from the paper: a paper's MGN keeps its bytes and hashes."""
        fields: dict[str, Any] = dump(self)
        optional = ("ibn", "stem_pool", "global_stride", "pooling", "neck")
        defaults = {name: type(self).model_fields[name].default for name in optional}
        return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}

    @property
    def features_per_branch(self) -> tuple[int, ...]:
        """Reduced features of each branch: the global one and, for N > 1, one a stripe."""
        return tuple(map(features_of, self.branches))

    @property
    def features(self) -> int:
        return sum(self.features_per_branch)

    @property
    def dim(self) -> int:
        """Width of the embedding: 8 x 256 = 2048 for the paper's MGN."""
        return self.features * self.reduced_width


def stripe_rows(height: int, stripes: int) -> list[tuple[int, int]]:
    """First and past-the-last row of each horizontal stripe of a map of `height` rows.

    The paper's maps divide evenly (24 rows by 2 and 3). Where they don't, stripe i covers rows floor(i*H/N) to
    ceil((i+1)*H/N), so neighbours share a row: this is torch's adaptive pooling, which public MGNs use.
    """
    return [(i * height // stripes, -(-(i + 1) * height // stripes)) for i in range(stripes)]


def region_rows(height: int, stripes: int) -> list[tuple[int, int]]:
    """First and past-the-last row of each region that a branch pools: the whole map and, for several stripes, each one."""
    return [(0, height), *(stripe_rows(height, stripes) if stripes > 1 else [])]


def features_of(stripes: int) -> int:
    """How many regions a branch pools, and so how many reduced features it has."""
    return 1 if stripes == 1 else 1 + stripes
