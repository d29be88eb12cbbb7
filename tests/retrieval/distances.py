"""Rows to measure distances between."""

from __future__ import annotations

import numpy as np

# BLAS may round a product of unit rows otherwise in other blocks: tiles agree to this, not bit by bit.
ROUNDING = 1e-6


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
