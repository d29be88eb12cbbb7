"""What follows the trunk of a bundle with fused heads: from the branches' maps to embeddings.

On a GPU that is one call of the stripe-pool-reduce kernel on the engine's own buffers (`cuda_heads.py`), on the CPU the
kernel's definition (`kernels/reference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mgn_deploy.config import ModelConfig


@dataclass(frozen=True)
class FusedHeads:
    """The heads' numbers, all float32; those that go with the maps were rounded to the maps' type at export.

    `weight` is `[F, R, C]`, `bias` `[F, R]`, and so are `scale` and `shift` (neck "relu_norm", else None); `power` is
    `[F]` (pooling "gem", else None).
    """

    config: ModelConfig
    flip: bool
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    power: np.ndarray | None

    @cached_property
    def _exact_weight(self) -> np.ndarray:
        """As the definition takes it: float64 `[F, C, R]`."""
        return self.weight.transpose(0, 2, 1).astype(np.float64)

    def __call__(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """Maps `[n, C, H_b, W_b]` (with the mirror average the mirrors follow the images) -> float32 unit rows.

        By `kernels/reference.py`, in float64.
        """
        from mgn_deploy.kernels.reference import embed, stripe_pool_reduce

        def column(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[:, None]

        features = stripe_pool_reduce(
            maps,
            self.config.branches,
            self._exact_weight,
            self.bias[:, None],
            pooling=self.config.pooling,
            powers=self.power,
            neck=self.config.neck,
            scale=column(self.scale),
            shift=column(self.shift),
        )
        return embed(features, self.flip).astype(np.float32)
