"""What follows the trunk where the heads run as the stripe-pool-reduce kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mgn_deploy.config import ModelConfig


@dataclass(frozen=True)
class FusedHeads:
    """The heads' numbers, all float32; weights are rounded to the type of the maps that they go with.

    `weight` is `[F, R, C]`, `bias` `[F, R]`, and so are `scale` and `shift` (neck "relu_norm", else None); `power` is
    `[F]` (pooling "gem", else None). With `flip` the mirrors follow the images in a batch of maps.
    """

    config: ModelConfig
    flip: bool
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    power: np.ndarray | None
