"""The heads of an MGN in Triton's language, as a rival of `kernels/stripe_pool_reduce.cu`: were it as fast on a card,
the CUDA source would not be worth its length.

It takes what a GPU runs most: maxima, ReLU, maps that are channels last, 16 or 32 bits. Unlike the kernel it does not
promise that a NaN comes through a maximum. Without a GPU it runs by Triton's interpreter (TRITON_INTERPRET=1 in the
environment before this is imported): a check of what it computes, not of how fast.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ANN001, ANN201 - Triton's functions: their arguments are pointers and numbers of its own language

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgn_deploy.config import features_of, stripe_rows

PIXELS, CHANNELS = 32, 64  # of a tile of the pool: 64 channels of 16 bits are a line of 128 bytes
IMAGES, OUTPUTS, DEPTH = 16, 32, 64  # of a tile of the reduction: the paper's 2048 outputs are 64 tiles
MOST_STRIPES = 8


def triton_heads(
    maps: Sequence[Tensor], branches: Sequence[int], weight: Tensor, bias: Tensor, mirror: bool = False
) -> Tensor:
    """Compute unit rows, float32 `[n, F * R]`; with `mirror` `[n / 2, F * R]` of the averages of rows i and i + n / 2.

    Args:
        maps: one `[n, C, H_b, W_b]` a branch, channels last.
        branches: number of stripes of each, 1 to 8.
        weight: `[F, R, C]`, of the maps' type.
        bias: `[F, R]`, float32.

    Raises:
        ValueError: a map is not channels last, a branch has more stripes, or `mirror` has an odd number of rows.
    """
    n, channels = maps[0].shape[:2]
    features, reduced, _ = weight.shape
    if not all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in maps):
        raise ValueError("triton_heads: the maps have to be channels last")
    if max(branches) > MOST_STRIPES or (mirror and n % 2):
        raise ValueError(f"triton_heads: at most {MOST_STRIPES} stripes, and as many mirrors as images")
    pooled = torch.empty((features, n, channels), dtype=maps[0].dtype, device=maps[0].device)
    first = 0
    for map_, stripes in zip(maps, branches, strict=True):
        height, width = map_.shape[2:]
        borders = [row * width for rows in stripe_rows(height, stripes) for row in rows]
        pool[(n, triton.cdiv(channels, CHANNELS))](
            map_, pooled[first:], n, channels, height * width, *borders, *[0] * (2 * MOST_STRIPES - len(borders)),
            STRIPES=stripes, PIXELS=PIXELS, CHANNELS=CHANNELS,
        )  # fmt: skip
        first += features_of(stripes)
    reduced_rows = torch.empty((n, features * reduced), device=weight.device)
    grid = (features, triton.cdiv(n, IMAGES), triton.cdiv(reduced, OUTPUTS))
    reduce[grid](
        pooled, weight, bias, reduced_rows, n, channels, reduced, features * reduced,
        IMAGES=IMAGES, OUTPUTS=OUTPUTS, DEPTH=DEPTH,
    )  # fmt: skip
    rows = n // 2 if mirror else n
    embeddings = torch.empty((rows, features * reduced), device=weight.device)
    columns = triton.next_power_of_2(features * reduced)
    finish[(rows,)](reduced_rows, embeddings, rows, features * reduced, MIRROR=mirror, COLUMNS=columns)
    return embeddings


@triton.jit
def pool(
    map_, pooled, n, channels, pixels,
    b0, e0, b1, e1, b2, e2, b3, e3, b4, e4, b5, e5, b6, e6, b7, e7,
    STRIPES: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Maxima of one image's map, for a tile of channels: of each stripe (pixels b to e), and from those of the map."""
    image, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    borders = ((b0, e0), (b1, e1), (b2, e2), (b3, e3), (b4, e4), (b5, e5), (b6, e6), (b7, e7))
    whole = tl.full((CHANNELS,), float("-inf"), tl.float32)
    for stripe in tl.static_range(STRIPES):
        begin, end = borders[stripe]
        largest = tl.full((CHANNELS,), float("-inf"), tl.float32)
        for at in range(begin, end, PIXELS):
            pixel = at + tl.arange(0, PIXELS)
            where = map_ + (image * pixels + pixel[:, None]) * channels + channel[None, :]
            values = tl.load(where, mask=(pixel[:, None] < end) & inside[None, :], other=float("-inf"))
            largest = tl.maximum(largest, tl.max(values.to(tl.float32), axis=0))
        if STRIPES > 1:
            tl.store(pooled + ((1 + stripe) * n + image) * channels + channel, largest, mask=inside)
        whole = tl.maximum(whole, largest)
    tl.store(pooled + image * channels + channel, whole, mask=inside)


@triton.jit
def reduce(
    pooled, weight, bias, output, n, channels, reduced, dim,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of images by outputs of one feature: products over all channels, bias and ReLU."""
    feature = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
    out = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((IMAGES, OUTPUTS), tl.float32)
    for first in range(0, channels, DEPTH):
        channel = first + tl.arange(0, DEPTH)
        rows = pooled + (feature * n + image[:, None]) * channels + channel[None, :]
        columns = weight + (feature * reduced + out[None, :]) * channels + channel[:, None]
        x = tl.load(rows, mask=(image[:, None] < n) & (channel[None, :] < channels), other=0.0)
        w = tl.load(columns, mask=(out[None, :] < reduced) & (channel[:, None] < channels), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    total = tl.maximum(total + tl.load(bias + feature * reduced + out, mask=out < reduced, other=0.0)[None, :], 0.0)
    where = output + image[:, None].to(tl.int64) * dim + feature * reduced + out[None, :]
    tl.store(where, total, mask=(image[:, None] < n) & (out[None, :] < reduced))


@triton.jit
def finish(reduced_rows, embeddings, rows, dim, MIRROR: tl.constexpr, COLUMNS: tl.constexpr):
    """One row: the average with its mirror, over its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < dim
    values = tl.load(reduced_rows + row * dim + column, mask=inside, other=0.0)
    if MIRROR:
        mirrored = tl.load(reduced_rows + (row + rows) * dim + column, mask=inside, other=0.0)
        values = (values + mirrored) * 0.5
    norm = tl.sqrt(tl.sum(values * values, axis=0))
    tl.store(embeddings + row * dim + column, values / tl.maximum(norm, 1e-12), mask=inside)
