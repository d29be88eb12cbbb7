"""Arguments of torch.ops.mgn_deploy.stripe_pool_reduce, and its definition on them."""

from __future__ import annotations

import torch
from emulator.reference import stripe_pool_reduce

from mgn_deploy.config import features_of

BRANCHES, SIZES = (1, 2, 3), ((3, 2), (4, 3), (7, 3))


def arguments(pooling="max", neck="relu", dtype=torch.float32, n=2, channels=8, reduced=16, seed=0, device="cpu"):
    """Arguments of the op; the maps channels-last but the first."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, of=wide):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, of)

    features = sum(map(features_of, BRANCHES))
    maps = [normal(n, channels, *size, of=dtype) + (2 if pooling == "gem" else 0) for size in SIZES]
    maps = maps[:1] + [map_.to(memory_format=torch.channels_last) for map_ in maps[1:]]
    return {
        "maps": maps,
        "branches": list(BRANCHES),
        "weight": normal(features, reduced, channels, of=dtype),
        "bias": normal(features, reduced),
        "pooling": pooling,
        "neck": neck,
        "powers": normal(features).abs() + 1.5 if pooling == "gem" else None,
        "scale": normal(features, reduced) if neck == "relu_norm" else None,
        "shift": normal(features, reduced) if neck == "relu_norm" else None,
    }


def op(given):
    return torch.ops.mgn_deploy.stripe_pool_reduce(*given.values())


def definition(given):
    def numpy(tensor):
        return None if tensor is None else tensor.detach().double().cpu().numpy()

    def column(tensor):
        return None if tensor is None else numpy(tensor)[:, None]

    return stripe_pool_reduce(
        [numpy(map_) for map_ in given["maps"]],
        given["branches"],
        numpy(given["weight"]).transpose(0, 2, 1),
        column(given["bias"]),
        pooling=given["pooling"],
        powers=numpy(given["powers"]),
        neck=given["neck"],
        scale=column(given["scale"]),
        shift=column(given["shift"]),
    )


def tensors_of(given):
    return [*given["maps"], *(given[name] for name in ("weight", "bias", "powers", "scale", "shift"))]


def requiring_gradients(given):
    for tensor in tensors_of(given):
        if tensor is not None:
            tensor.requires_grad_()
    return given
