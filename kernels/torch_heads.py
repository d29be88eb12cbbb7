"""The arguments of `torch_op.py`'s operator: checked, computed by PyTorch's operators, and arranged for the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgn_deploy.config import GEM_EPSILON, features_of, region_rows
from mgn_deploy.kernels.params import Pointers
from mgn_deploy.kernels.plan import NECKS, POOLINGS, Problem


@dataclass
class Heads:
    """The operator's arguments, as `stripe_pool_reduce` describes them."""

    maps: Sequence[Tensor]
    branches: Sequence[int]
    weight: Tensor
    bias: Tensor
    pooling: str = "max"
    neck: str = "relu"
    powers: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def check(self) -> None:
        """Raise ValueError where they do not fit each other."""
        if self.pooling not in POOLINGS or self.neck not in NECKS:
            known = f"{', '.join(POOLINGS)} and {', '.join(NECKS)}"
            raise ValueError(f"stripe_pool_reduce: pooling {self.pooling!r}, neck {self.neck!r}: there are {known}")
        maps, branches, weight, dtype = self.maps, self.branches, self.weight, self.weight.dtype
        if not maps or len(maps) != len(branches) or any(stripes < 1 for stripes in branches):
            raise ValueError(
                "stripe_pool_reduce: needs one number of stripes, at least 1, for each of one or more maps"
            )
        features = sum(map(features_of, branches))
        n, channels = maps[0].shape[:2]
        if weight.dim() != 3 or weight.shape[0] != features or weight.shape[2] != channels:
            raise ValueError(f"stripe_pool_reduce: weight is {list(weight.shape)}, needs [{features}, R, {channels}]")
        for map_ in maps:
            if map_.dim() != 4 or map_.shape[:2] != maps[0].shape[:2] or map_.dtype != dtype:
                found = f"{map_.dtype} {list(map_.shape)}"
                raise ValueError(f"stripe_pool_reduce: a map is {found}, needs {dtype} [{n}, {channels}, H, W]")
        vectors: dict[str, Tensor | None] = {"bias": self.bias}
        if self.neck == "relu_norm":
            vectors |= {"scale": self.scale, "shift": self.shift}
        for name, vector in vectors.items():
            if vector is None or vector.shape != weight.shape[:2]:
                raise ValueError(f"stripe_pool_reduce: {name} needs the shape {list(weight.shape[:2])}")
        if self.pooling == "gem" and (self.powers is None or self.powers.shape != weight.shape[:1]):
            raise ValueError(f"stripe_pool_reduce: the pooling gem needs powers of shape [{features}]")
        # PyTorch looks at one of them to choose the kernel, which would read another's host address as the GPU's.
        own = {f"map {index}": map_ for index, map_ in enumerate(maps)} | {"weight": weight, "bias": self.bias}
        for name, tensor in {**own, "powers": self.powers, "scale": self.scale, "shift": self.shift}.items():
            if tensor is not None and tensor.device != maps[0].device:
                raise ValueError(
                    f"stripe_pool_reduce: {name} is on {tensor.device}, needs {maps[0].device} as map 0 is"
                )

    def features(self, *, graded: bool = False) -> Tensor:
        """Compute the operator's result by PyTorch's operators: `[n, F * R]`. Where `graded`, a maximum's gradient goes
        to the first pixel that has it."""
        pooled = wide(torch.stack(self._pooled(graded)))  # [F, n, C]
        reduced = torch.baddbmm(wide(self.bias).unsqueeze(1), pooled, wide(self.weight).transpose(1, 2))
        if self.neck != "linear":
            reduced = reduced.relu()
        if self.neck == "relu_norm":
            assert self.scale is not None
            assert self.shift is not None
            reduced = reduced * self.scale.unsqueeze(1) + self.shift.unsqueeze(1)
        return reduced.transpose(0, 1).flatten(1).to(self.maps[0].dtype)

    def _pooled(self, graded: bool) -> list[Tensor]:
        """Pool all regions, `[n, C]` each. Unlike `train.model.stripe_pool`, which networks run, it sums in float32 or
        wider."""
        vectors: list[Tensor] = []
        for map_, stripes in zip(self.maps, self.branches, strict=True):
            for first, last in region_rows(map_.shape[2], stripes):
                region = map_[:, :, first:last]
                if self.pooling == "max":
                    # The second spreads the gradient over all that are equal, and copies no map that is channels last.
                    vector = region.flatten(2).max(2).values if graded else region.amax((2, 3))
                elif self.pooling == "avg":
                    vector = wide(region).mean((2, 3))
                else:
                    assert self.powers is not None
                    power = self.powers[len(vectors)]
                    vector = wide(region).clamp(min=GEM_EPSILON).pow(power).mean((2, 3)).pow(1 / power)
                vectors.append(vector)
        return vectors

    @property
    def channels_last(self) -> bool:
        return all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in self.maps)

    def arranged(self) -> Heads:
        """Return what the kernels read: dense, aligned, the small ones in float32; copies where they differ."""
        given = {name: getattr(self, name) for name in ("bias", "powers", "scale", "shift")}
        small = {name: tensor.float().contiguous() for name, tensor in given.items() if tensor is not None}
        format_ = torch.channels_last if self.channels_last else torch.contiguous_format
        return replace(
            self,
            maps=[_aligned(map_.contiguous(memory_format=format_)) for map_ in self.maps],
            weight=_aligned(self.weight.contiguous()),
            **small,
        )

    def problem(self, output: str = "features", path: str = "auto") -> Problem:
        """What the kernels compute of them.

        Raises:
            ValueError: it is not one that they take.
        """
        n, channels = self.maps[0].shape[:2]
        return Problem(
            str(self.maps[0].dtype).removeprefix("torch."),
            "nhwc" if self.channels_last else "nchw",
            int(n),
            int(channels),
            int(self.weight.shape[1]),
            tuple(self.branches),
            tuple((int(map_.shape[2]), int(map_.shape[3])) for map_ in self.maps),
            pooling=self.pooling,
            neck=self.neck,
            output=output,
            path=path,
        )

    def pointers(self, workspace: Tensor, output: Tensor) -> Pointers:
        """Where the kernels find them, once `arranged`."""

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        return Pointers(
            tuple(map_.data_ptr() for map_ in self.maps),
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            address(self.scale),
            address(self.shift),
            address(self.powers),
            workspace.data_ptr(),
            output.data_ptr(),
        )


def wide(x: Tensor) -> Tensor:
    """Widen to what sums are made in: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _aligned(tensor: Tensor) -> Tensor:
    """Copy what begins off 16 bytes, as a slice of a batch may: the kernels load that many at a time."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
