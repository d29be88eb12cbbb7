"""`torch.ops.mgn_deploy.stripe_pool_reduce`: the heads of an MGN as one PyTorch operator. Importing this registers it.

On CUDA it is the kernels of `stripe_pool_reduce.cu`, compiled on first use; on the CPU it is PyTorch's operators. It
has a gradient in every tensor argument, that of a maximum going to the first pixel that has it, and works under
`torch.compile` and `torch.export`. `tests/emulator/reference.py` is the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mgn_deploy.kernels.nvrtc import PlannedKernel
from mgn_deploy.kernels.plan import BARRIER_BYTES
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
    """Compute the gradients of all arguments, by PyTorch's operators in float32 or wider, rounded once.

    The features are computed again: keeping what they are made from would cost memory that training is short of, and
    computing it is one pass over the maps.
    """
    given = ctx.saved_tensors
    exact: list[Any] = [None if tensor is None else wide(tensor).detach().requires_grad_() for tensor in given]
    maps, (weight, bias, *optional) = exact[: ctx.maps], exact[ctx.maps :]
    with torch.enable_grad():
        features = Heads(maps, ctx.branches, weight, bias, ctx.pooling, ctx.neck, *optional).features(graded=True)
    leaves = [tensor for tensor in exact if tensor is not None]
    found = iter(torch.autograd.grad(features, leaves, wide(gradient), allow_unused=True))
    of = [None if leaf is None else next(found) for leaf in exact]
    of = [None if one is None else one.to(tensor.dtype) for one, tensor in zip(of, given, strict=True)]
    of_weight, of_bias, *of_optional = of[ctx.maps :]
    gradients = of[: ctx.maps], None, of_weight, of_bias, None, None, *of_optional
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


_planned = lru_cache(maxsize=256)(PlannedKernel)
