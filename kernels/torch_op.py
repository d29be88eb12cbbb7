"""`torch.ops.mgn_deploy.stripe_pool_reduce`: the heads of an MGN as one PyTorch operator. Importing this registers it.

On CUDA it is the kernels of `stripe_pool_reduce.cu`, compiled on first use; on the CPU it is PyTorch's operators. It
has a gradient in every tensor argument, that of a maximum going to the first pixel that has it, and works under
`torch.compile` and `torch.export`. `kernels/reference.py` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mgn_deploy.config import GEM_EPSILON, features_of, region_rows
from mgn_deploy.kernels.nvrtc import PlannedKernel
from mgn_deploy.kernels.params import Pointers
from mgn_deploy.kernels.plan import BARRIER_BYTES, NECKS, POOLINGS, Problem


@torch.library.custom_op("mgn_deploy::stripe_pool_reduce", mutates_args=(), device_types="cpu")
def stripe_pool_reduce(
    maps: Sequence[Tensor],
    branches: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    pooling: str = "max",
    neck: str = "relu",
    powers: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Features `[n, F * R]` of the branches' maps, in the maps' dtype; sums are in float32 or wider.

    Args:
        maps: one `[n, C, H_b, W_b]` a branch, of one dtype: float32, float16, bfloat16 (on the CPU also float64). On CUDA
            each is read as it lies, contiguous or channels-last, if all of them lie the same way, and is copied otherwise.
        branches: number of stripes of each branch.
        weight: `[F, R, C]` in the maps' dtype: each pooled vector's 1x1 convolution, norms folded in.
        bias: `[F, R]`, as are `scale` and `shift`, which go with the neck "relu_norm"; float32.
        pooling: "max", "avg" or "gem"; `powers` `[F]`, float32, go with "gem".
        neck: "relu", "linear" or "relu_norm", what follows weight and bias.

    Raises:
        ValueError: shapes, devices or choices do not fit each other; on CUDA also what `kernels/plan.py` refuses.
    """
    heads = Heads(maps, branches, weight, bias, pooling, neck, powers, scale, shift)
    heads.check()
    return heads.features()


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
            raise ValueError(
                f"stripe_pool_reduce: pooling {self.pooling!r} is not one of {', '.join(POOLINGS)} or neck {self.neck!r} "
                f"not one of {', '.join(NECKS)}"
            )
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
        vectors = {"bias": self.bias}
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

    def features(self) -> Tensor:
        """Compute the operator's result by PyTorch's operators: `[n, F * R]`."""
        reduced = self.products(self.pooled()[0])
        if self.neck != "linear":
            reduced = reduced.relu()
        if self.neck == "relu_norm":
            assert self.scale is not None
            assert self.shift is not None
            reduced = reduced * self.scale.unsqueeze(1) + self.shift.unsqueeze(1)
        return reduced.transpose(0, 1).flatten(1).to(self.maps[0].dtype)

    def pooled(self) -> tuple[Tensor, list[Tensor]]:
        """Pool all regions: vectors `[F, n, C]`, and for "max" where in its map each maximum is, `[n, C]` each, as
        row * W + column.

        Unlike `train.model.stripe_pool`, which networks run, it sums in float32 or wider and finds what a gradient of a
        maximum goes to.
        """
        vectors: list[Tensor] = []
        places: list[Tensor] = []
        for map_, stripes in zip(self.maps, self.branches, strict=True):
            for first, last in region_rows(map_.shape[2], stripes):
                region = map_[:, :, first:last]
                if self.pooling == "max":
                    vector, place = functional.adaptive_max_pool2d(region, 1, return_indices=True)
                    places.append(place.flatten(1) + first * map_.shape[3])
                    vector = vector.flatten(1)
                elif self.pooling == "avg":
                    vector = _wide(region).mean((2, 3))
                else:
                    assert self.powers is not None
                    power = self.powers[len(vectors)]
                    vector = _wide(region).clamp(min=GEM_EPSILON).pow(power).mean((2, 3)).pow(1 / power)
                vectors.append(_wide(vector))
        return torch.stack(vectors), places

    def products(self, pooled: Tensor) -> Tensor:
        """Reduce pooled vectors to `[F, n, R]`, before what the neck adds."""
        return torch.baddbmm(_wide(self.bias).unsqueeze(1), pooled, _wide(self.weight).transpose(1, 2))

    @property
    def channels_last(self) -> bool:
        return all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in self.maps)

    def arranged(self) -> Heads:
        """The same as the kernels read them: dense, aligned, the small ones in float32; copies where they are otherwise."""

        def float32(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.float().contiguous()

        format_ = torch.channels_last if self.channels_last else torch.contiguous_format
        return replace(
            self,
            maps=[_aligned(map_.contiguous(memory_format=format_)) for map_ in self.maps],
            weight=_aligned(self.weight.contiguous()),
            bias=self.bias.float().contiguous(),
            powers=float32(self.powers),
            scale=float32(self.scale),
            shift=float32(self.shift),
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


def _wide(x: Tensor) -> Tensor:
    """As sums are made: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _aligned(tensor: Tensor) -> Tensor:
    """The kernels load 16 bytes at a time, which a slice of a batch may begin off."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@stripe_pool_reduce.register_fake
def _fake(*arguments: Any, **named: Any) -> Tensor:
    heads = Heads(*arguments, **named)
    heads.check()
    return heads.maps[0].new_empty((heads.maps[0].shape[0], heads.weight.shape[0] * heads.weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, branches, weight, bias, pooling, neck, powers, scale, shift = inputs
    ctx.branches, ctx.pooling, ctx.neck, ctx.maps = branches, pooling, neck, len(maps)
    ctx.save_for_backward(*maps, weight, bias, powers, scale, shift)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Compute the gradients of all arguments.

    The pooled vectors are made again: keeping them would cost memory that training is short of, and making them is one pass
    over the maps.
    """
    maps = list(ctx.saved_tensors[: ctx.maps])
    weight, bias, powers, scale, _ = ctx.saved_tensors[ctx.maps :]
    heads = Heads(maps, ctx.branches, weight, bias, ctx.pooling, ctx.neck, powers, scale)
    pooled, places = heads.pooled()
    products = heads.products(pooled)
    of_reduced = _wide(gradient).reshape(-1, *weight.shape[:2]).transpose(0, 1)  # [F, n, R]
    of_scale = of_shift = of_powers = None
    if ctx.neck == "relu_norm":
        of_scale, of_shift = (of_reduced * products.relu()).sum(1), of_reduced.sum(1)
        of_reduced = of_reduced * scale.unsqueeze(1)
    if ctx.neck != "linear":
        of_reduced = torch.where(products > 0, of_reduced, 0)
    of_pooled = torch.bmm(of_reduced, _wide(weight))  # [F, n, C]
    of_weight = torch.bmm(of_reduced.transpose(1, 2), pooled).to(weight.dtype)
    of_bias = of_reduced.sum(1).to(bias.dtype)

    of_maps, feature = [], 0
    of_power: list[Tensor] = []
    for map_, stripes in zip(maps, ctx.branches, strict=True):
        width = map_.shape[3]
        of_map = of_pooled.new_zeros(map_.shape)
        for first, last in region_rows(map_.shape[2], stripes):
            of_vector = of_pooled[feature]
            if ctx.pooling == "max":
                # One region at a time: a pixel may be the maximum of several, and sums keep their order.
                at = places[feature].unsqueeze(2)
                of_map = of_map.flatten(2).scatter_add(2, at, of_vector.unsqueeze(2)).reshape(map_.shape)
            elif ctx.pooling == "avg":
                of_map[:, :, first:last] += (of_vector / ((last - first) * width))[:, :, None, None]
            else:
                region, power = _wide(map_[:, :, first:last]), powers[feature]
                bounded, vector = region.clamp(min=GEM_EPSILON), pooled[feature]
                steep = (of_vector * vector.pow(1 - power) / ((last - first) * width))[:, :, None, None]
                of_map[:, :, first:last] += torch.where(region >= GEM_EPSILON, steep * bounded.pow(power - 1), 0)
                # ln y = ln(mean x^p) / p, differentiated in p
                logs = (bounded.pow(power) * bounded.log()).mean((2, 3)) / vector.pow(power)
                of_power.append((of_vector * vector * (logs - vector.log()) / power).sum())
            feature += 1
        of_maps.append(of_map.to(map_.dtype))
    if of_power:
        of_powers = torch.stack(of_power)
    return of_maps, None, of_weight, of_bias, None, None, of_powers, of_scale, of_shift


stripe_pool_reduce.register_autograd(_backward, setup_context=_setup_context)


@stripe_pool_reduce.register_kernel("cuda")
def _cuda(*arguments: Any, **named: Any) -> Tensor:
    given = Heads(*arguments, **named)
    given.check()
    device = given.maps[0].device
    with torch.cuda.device(device):
        # Held until the launch: copies must not be freed before it; after it, the allocator keeps them for this stream.
        heads = given.arranged()
        planned = _planned(heads.problem(), device.index)
        workspace = torch.empty(planned.workspace_bytes, dtype=torch.uint8, device=device)
        if planned.plan.path == "fused":  # the others have no barrier
            workspace[:BARRIER_BYTES].zero_()
        features = heads.maps[0].new_empty((planned.problem.rows, heads.weight.shape[0] * heads.weight.shape[1]))
        planned.launch(heads.pointers(workspace, features), torch.cuda.current_stream(device).cuda_stream)
    return features


@lru_cache(maxsize=256)
def _planned(problem: Problem, device_id: int) -> PlannedKernel:
    return PlannedKernel(problem, device_id)
