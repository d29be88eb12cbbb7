"""The definition of stripe-pool-reduce, in NumPy: the ONNX operators, PyTorch's and every kernel are tested against it.

Section 3.1 of the paper: each branch's last map is max-pooled over the whole map and over N equal horizontal stripes,
and every pooled vector is reduced by its own 1x1 convolution, batch norm (folded into `weight` and `bias`) and ReLU.
Public checkpoints pool by mean or generalised mean and have no ReLU or another norm after it (`mgn_deploy/config.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mgn_deploy.choices import Neck, Pooling
from mgn_deploy.config import GEM_EPSILON, features_of, region_rows


def stripe_pool(
    feature_map: np.ndarray, stripes: int, pooling: Pooling = "max", powers: np.ndarray | None = None
) -> list[np.ndarray]:
    """Pool a map `[n, C, H, W]`: the whole of it, then (for more than one) each stripe; `[n, C]` each.

    Maxima are of the map's dtype, means float64. NaN propagates, as in torch. `powers`, for "gem", is one a region.

    Raises:
        ValueError: a generalised mean has not as many powers as regions.
    """
    regions = [feature_map[:, :, first:last] for first, last in region_rows(feature_map.shape[2], stripes)]
    if pooling == "max":
        return [region.max(axis=(2, 3)) for region in regions]
    if pooling == "avg":
        return [region.mean(axis=(2, 3), dtype=np.float64) for region in regions]
    if powers is None or len(powers) != len(regions):
        raise ValueError(f"generalised mean of {len(regions)} regions needs as many powers")
    exact = np.asarray(powers, np.float64)
    return [
        (np.maximum(region.astype(np.float64), GEM_EPSILON) ** power).mean(axis=(2, 3)) ** (1 / power)
        for region, power in zip(regions, exact, strict=True)
    ]


def stripe_pool_reduce(
    maps: Sequence[np.ndarray],
    branches: Sequence[int],
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    pooling: Pooling = "max",
    powers: np.ndarray | None = None,
    neck: Neck = "relu",
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the features `[n, F * R]`, float64, of the branches' maps.

    Args:
        maps: one `[n, C, H_b, W_b]` a branch.
        branches: number of stripes of each branch.
        weight: `[F, C, R]`, one reduction for each pooled vector in the order of `stripe_pool`.
        bias: `[F, 1, R]`.
        pooling: of every region; `powers` `[F]` goes with "gem".
        neck: what follows weight and bias; `scale` and `shift` `[F, 1, R]`, the second norm, go with "relu_norm".

    Raises:
        ValueError: powers, scale or shift are missing.
    """
    pooled, first = [], 0
    for map_, stripes in zip(maps, branches, strict=True):
        features = features_of(stripes)
        pooled += stripe_pool(map_, stripes, pooling, None if powers is None else powers[first : first + features])
        first += features
    reduced = np.stack(pooled).astype(np.float64) @ np.asarray(weight, np.float64) + bias  # [F, n, R]
    if neck != "linear":
        reduced = np.maximum(reduced, 0)
    if neck == "relu_norm":
        if scale is None or shift is None:
            raise ValueError("the neck relu_norm needs scale and shift")
        reduced = reduced * scale + shift
    by_image = reduced.transpose(1, 0, 2)
    return by_image.reshape(len(by_image), -1)


def embed(features: np.ndarray, flip: bool) -> np.ndarray:
    """Average with the mirrors (images first, mirrors last; section 4.1) and divide by the L2 norm.

    `[2n, d]`, or `[n, d]` without `flip`, -> unit rows `[n, d]`; a row of zeros stays one.
    """
    if flip:
        half = len(features) // 2
        features = (features[:half] + features[half:]) / 2
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
