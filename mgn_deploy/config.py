"""What an MGN is: the few numbers that training, export and every engine must agree on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from mgn_deploy.choices import GlobalStride, Ibn, Neck, Pooling, StemPool
from mgn_deploy.errors import UserError, first_problem

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GEM_EPSILON = 1e-6  # the least value that a generalised mean takes, as in fast-reid
_Deviation = Annotated[FiniteFloat, Field(gt=0)]


class ModelConfig(BaseModel):
    """Architecture and input of one MGN (Wang et al. 2018, sections 3.1 and 4.1; defaults are the paper's).

    `backbone` is a torchvision ResNet; `base_width` is the number of channels of its stem, 64 as published, fewer for a
    network that a CPU trains in minutes. `branches` holds each branch's number of stripes: 1 is the global branch,
    N > 1 pools N stripes beside the whole map. `height` and `width` are in pixels, `mean` and `std` of RGB on the scale
    of 0 to 1. `num_classes` is the number of identities that the classifiers were trained on; 0: none.

    The last five fields are what public checkpoints do otherwise than the paper (`train/importers`); a config without
    them is the paper's:

    - `ibn`: "a" puts instance norm on half the channels of each block's first norm in layer1 to layer3 (Pan et al.
      2018).
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
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = IMAGENET_MEAN
    std: tuple[_Deviation, _Deviation, _Deviation] = IMAGENET_STD
    num_classes: int = Field(0, ge=0, le=10**7)
    ibn: Ibn = "none"
    stem_pool: StemPool = "padded"
    global_stride: GlobalStride = 2
    pooling: Pooling = "max"
    neck: Neck = "relu"

    @field_validator("branches")
    @classmethod
    def _branches(cls, branches: tuple[int, ...]) -> tuple[int, ...]:
        if not 1 <= len(branches) <= 16 or not all(1 <= stripes <= 8 for stripes in branches):
            raise ValueError("give one number of stripes (1 to 8) a branch, of 1 to 16 branches, e.g. 1,2,3")
        return branches

    @classmethod
    def checked(cls, **fields: Any) -> ModelConfig:
        """Make a config of values that a user gave.

        Raises:
            UserError: a field is unknown or out of range; the message names the first one.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise UserError(first_problem(error)) from None

    @property
    def features_per_branch(self) -> tuple[int, ...]:
        """Reduced features of each branch: the global one and, for N > 1, one a stripe."""
        return tuple(map(features_of, self.branches))

    @property
    def features(self) -> int:
        """Reduced features of all branches: 8 for the paper's MGN."""
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
    """First and past-the-last row of each region that a branch pools: the whole map and, for several stripes, each
    one."""
    return [(0, height), *(stripe_rows(height, stripes) if stripes > 1 else [])]


def features_of(stripes: int) -> int:
    """How many regions a branch pools, and so how many reduced features it has."""
    return 1 if stripes == 1 else 1 + stripes


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels of a `--size` argument, HEIGHTxWIDTH.

    Raises:
        UserError: the text is not two whole numbers around an x.
    """
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {text}: sizes are like 384x128") from None
    return height, width


def parse_branches(text: str) -> tuple[int, ...]:
    """Stripes of each branch of a `--branches` argument, as in "1,2,3"; `ModelConfig` checks their range.

    Raises:
        UserError: the text is not whole numbers between commas.
    """
    try:
        return tuple(int(stripes) for stripes in text.split(","))
    except ValueError:
        raise UserError(f"--branches {text}: branches are like 1,2,3") from None
