"""`torch.ops.mgn_deploy.stripe_pool_reduce`: the heads of an MGN as one PyTorch operator. Importing this registers it.

On CUDA it is the kernels of `stripe_pool_reduce.cu`, compiled on first use; on the CPU it is PyTorch's operators. It
has a gradient in every tensor argument, that of a maximum going to the first pixel that has it, and works under
`torch.compile` and `torch.export`. `kernels/reference.py` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mgn_deploy.config import GEM_EPSILON, region_rows
from mgn_deploy.kernels.nvrtc import PlannedKernel
from mgn_deploy.kernels.plan import BARRIER_BYTES, Problem
from mgn_deploy.kernels.torch_heads import Heads, wide


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
    """Compute the features `[n, F * R]` of the branches' maps, in the maps' dtype; sums are in float32 or wider.

    Args:
        maps: one `[n, C, H_b, W_b]` a branch, of one dtype: float32, float16, bfloat16 (on the CPU also float64). On
            CUDA they are read as they lie, contiguous or channels-last, if all lie the same way, and copied otherwise.
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

    The pooled vectors are computed again: keeping them would cost memory that training is short of, and computing them
    is one pass over the maps.
    """
    maps = list(ctx.saved_tensors[: ctx.maps])
    weight, bias, powers, scale, _ = ctx.saved_tensors[ctx.maps :]
    heads = Heads(maps, ctx.branches, weight, bias, ctx.pooling, ctx.neck, powers, scale)
    pooled, places = heads.pooled()
    products = heads.products(pooled)
    of_reduced = wide(gradient).reshape(-1, *weight.shape[:2]).transpose(0, 1)  # [F, n, R]
    of_scale = of_shift = of_powers = None
    if ctx.neck == "relu_norm":
        of_scale, of_shift = (of_reduced * products.relu()).sum(1), of_reduced.sum(1)
        of_reduced = of_reduced * scale.unsqueeze(1)
    if ctx.neck != "linear":
        of_reduced = torch.where(products > 0, of_reduced, 0)
    of_pooled = torch.bmm(of_reduced, wide(weight))  # [F, n, C]
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
                region, power = wide(map_[:, :, first:last]), powers[feature]
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
    gradients = of_maps, None, of_weight, of_bias, None, None, of_powers, of_scale, of_shift
    # PyTorch 2.11 drops trailing arguments that have their defaults from the inputs that it wants gradients of.
    return gradients[: len(ctx.needs_input_grad)]


stripe_pool_reduce.register_autograd(_backward, setup_context=_setup_context)


@stripe_pool_reduce.register_kernel("cuda")
def _cuda(*arguments: Any, **named: Any) -> Tensor:
    given = Heads(*arguments, **named)
    given.check()
    return _launched(given, "features")


def embeddings(heads: Heads, flip: bool, *, kernel: bool) -> Tensor:
    """Compute unit rows `[n, F * R]`, or `[n / 2, F * R]` of the averages with the mirrors, in float32; no gradient.

    Args:
        heads: their maps' mirrors follow the images.
        flip: whether they have mirrors.
        kernel: by the kernels of `stripe_pool_reduce.cu`, on a GPU: norm and average are inside. Otherwise by PyTorch's
            operators. A first call plans, compiles and loads; later ones allocate by PyTorch alone: a CUDA graph can be
            captured of them.

    Raises:
        ValueError: shapes, devices or choices do not fit each other, or are none that the kernels take.
    """
    heads.check()
    if kernel:
        return _launched(heads, "mirror_embeddings" if flip else "embeddings")
    features = heads.features().float()
    if flip:
        features = features.unflatten(0, (2, -1)).mean(0)
    return normalize(features, dim=1)


def _launched(given: Heads, output: str) -> Tensor:
    device = given.maps[0].device
    with torch.cuda.device(device):
        # Held until the launch: copies must not be freed before it; after it, the allocator keeps them for this stream.
        heads = given.arranged()
        planned = _planned(heads.problem(output), device.index)
        workspace = torch.empty(planned.workspace_bytes, dtype=torch.uint8, device=device)
        if planned.plan.path == "fused":  # the others have no barrier
            workspace[:BARRIER_BYTES].zero_()
        dtype = heads.maps[0].dtype if output == "features" else torch.float32
        shape = (planned.problem.rows, heads.weight.shape[0] * heads.weight.shape[1])
        made = torch.empty(shape, dtype=dtype, device=device)
        planned.launch(heads.pointers(workspace, made), torch.cuda.current_stream(device).cuda_stream)
    return made


@lru_cache(maxsize=256)
def _planned(problem: Problem, device_id: int) -> PlannedKernel:
    return PlannedKernel(problem, device_id)
