"""What is measured of the heads: the cases, their inputs, their right answers, and how little they could cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mgn_deploy.config import features_of
from mgn_deploy.train.model import stripe_pool

OUTPUTS = ("features", "mirror_embeddings")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ||result - reference|| / ||reference||, the reference in float64: what sums in float32 may err by, whatever the maps'
# type, as their numbers and maxima are exact. TF32's 10 bits would be 3e-4 off.
EXACT = 1e-5
# The most that one rounding to the type moves a number by, of its own size: half a unit of the last of 11 and 8 bits.
# Of float32 it is in EXACT.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """Heads over the maps of `images` people: of the paper's MGN at 384x128 unless said otherwise.

    With `output` "mirror_embeddings" the maps are those of the images and of as many mirrors.
    """

    dtype: str
    layout: str
    output: str
    images: int
    channels: int = 2048
    reduced: int = 256
    branches: tuple[int, ...] = (1, 2, 3)
    sizes: tuple[tuple[int, int], ...] = ((12, 4), (24, 8), (24, 8))

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.layout} {self.output} {self.images}"

    @property
    def rows(self) -> int:
        """Rows of the maps."""
        return 2 * self.images if self.output == "mirror_embeddings" else self.images

    @property
    def features(self) -> int:
        return sum(map(features_of, self.branches))

    @property
    def bytes(self) -> int:
        """Fewest bytes that must move: each map, the weights and the bias read once, the result written once."""
        size = DTYPES[self.dtype].itemsize
        maps = self.rows * self.channels * sum(height * width for height, width in self.sizes)
        weight, bias = self.features * self.reduced * self.channels, self.features * self.reduced
        result = self.images * self.features * self.reduced * (size if self.output == "features" else 4)
        return size * (maps + weight) + 4 * bias + result

    @property
    def operations(self) -> int:
        """Operations of the reductions, a multiply-add being two."""
        return 2 * self.rows * self.features * self.reduced * self.channels


def all_cases(images: Sequence[int]) -> list[Case]:
    """List all cases, what matters most first: a run whose time is up has it."""
    first = [("float16", "nhwc"), ("float16", "nchw"), ("bfloat16", "nhwc"), ("float32", "nchw")]
    kinds = [(*kind, "mirror_embeddings") for kind in first]
    kinds += product(("float16", "bfloat16", "float32"), ("nhwc", "nchw"), OUTPUTS)
    return [Case(*kind, count) for kind in dict.fromkeys(kinds) for count in images]


@dataclass(frozen=True)
class Inputs:
    """Maps `[rows, C, H, W]`, laid out as the case says, weight `[F, R, C]` of their dtype, bias `[F, R]`, float32."""

    maps: list[Tensor]
    weight: Tensor
    bias: Tensor


def random_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Draw normally distributed numbers. The maps' dtype can hold the bias, for heads that add it in that dtype."""
    dtype, generator = DTYPES[case.dtype], torch.Generator(device).manual_seed(seed)
    format_ = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format

    def drawn(*shape: int, format_: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=format_).normal_(generator=generator)

    maps = [drawn(case.rows, case.channels, *size, format_=format_) for size in case.sizes]
    weight = drawn(case.features, case.reduced, case.channels).mul_(case.channels**-0.5)
    return Inputs(maps, weight, drawn(case.features, case.reduced).float())


def right_answer(case: Case, inputs: Inputs) -> Tensor:
    """Compute the result in float64: `[rows, F * R]` features or `[images, F * R]` embeddings.

    Maxima are exact in any dtype, so the maps stay in theirs.
    """
    pooled: list[Tensor] = []
    for map_, stripes in zip(inputs.maps, case.branches, strict=True):
        pooled += [vector.flatten(1).double() for vector in stripe_pool(map_, stripes)]
    reduced = torch.einsum("fnc,frc->nfr", torch.stack(pooled), inputs.weight.double()) + inputs.bias.double()
    return finish(reduced.relu().flatten(1), case.output)


def finish(features: Tensor, output: str) -> Tensor:
    """Do what `train.model.Embedding` does after the network: mirror average (images first, mirrors last), L2 norm."""
    if output == "features":
        return features
    half = len(features) // 2
    average = (features[:half] + features[half:]) / 2
    wide = average if average.dtype == torch.float64 else average.float()
    return torch.nn.functional.normalize(wide, dim=1)
