"""The definition of stripe-pool-reduce in NumPy: what the ONNX function and every kernel are tested against.

Section 3.1 of the paper: each branch's last map is max-pooled over the whole map and over N equal horizontal stripes,
and every pooled vector is reduced by its own 1x1 convolution, batch norm (folded into `weight` and `bias`) and ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mgn_deploy.config import stripe_rows


def stripe_pool(feature_map: np.ndarray, stripes: int) -> list[np.ndarray]:
    """Maxima of a map `[n, C, H, W]`: of the whole map, then (for more than one) of each stripe; `[n, C]` each.

    NaN propagates, as in torch's max.
    """
    pooled = [feature_map.max(axis=(2, 3))]
    if stripes > 1:
        pooled += [
            feature_map[:, :, first:last].max(axis=(2, 3)) for first, last in stripe_rows(feature_map.shape[2], stripes)
        ]
    return pooled


def stripe_pool_reduce(
    maps: Sequence[np.ndarray], branches: Sequence[int], weight: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """Features `[n, F * R]`, float64, of the branches' maps.

    Args:
        maps: one `[n, C, H_b, W_b]` a branch.
        branches: number of stripes of each branch.
        weight: `[F, C, R]`, one reduction for each pooled vector in the order of `stripe_pool`.
        bias: `[F, 1, R]`.
    """
    pooled = [vector for map_, stripes in zip(maps, branches, strict=True) for vector in stripe_pool(map_, stripes)]
    product = np.einsum("fnc,fcr->fnr", np.stack(pooled).astype(np.float64), weight.astype(np.float64)) + bias
    features = np.maximum(product, 0).transpose(1, 0, 2)
    return features.reshape(len(features), -1)


def embed(features: np.ndarray, flip: bool) -> np.ndarray:
    """Mirror average (images first, mirrors last; section 4.1) and L2 norm: `[2n or n, d]` -> unit rows `[n, d]`."""
    if flip:
        half = len(features) // 2
        features = (features[:half] + features[half:]) / 2
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
