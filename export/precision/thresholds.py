"""From what activations hold to where INT8 should cut them off: one threshold a tensor, by one of four methods.

- max: the largest magnitude seen; nothing is cut off.
- percentile: 99.99% of the magnitudes lie below.
- mse: the threshold with the least mean squared error of rounding and cutting off.
- entropy: the threshold whose quantised histogram is nearest to the original in Kullback-Leibler divergence
  (Migacz, "8-bit inference with TensorRT", GTC 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import rel_entr

from mgn_deploy.export.precision.ranges import BINS, TensorRange

LEVELS = 128  # magnitudes that int8 tells apart, zero included
PERCENTILE = 0.9999


def thresholds(ranges: Mapping[str, TensorRange], method: str) -> dict[str, float]:
    """The magnitude that maps to 127, by tensor name; above zero also where a tensor held only zeros.

    Args:
        ranges: with histograms, except for "max".
        method: one of `METHODS`.
    """
    return {name: max(METHODS[method](one), 1e-8) for name, one in ranges.items()}


def _percentile(one: TensorRange) -> float:
    counts = _counts(one)
    if not counts.sum():
        return one.largest
    within = np.cumsum(counts) / counts.sum()
    return one.largest * (int(np.searchsorted(within, PERCENTILE)) + 1) / BINS


def _mse(one: TensorRange) -> float:
    counts = _counts(one)
    centres = (np.arange(BINS) + 0.5) * one.largest / BINS
    best, least = one.largest, np.inf
    for edge in range(LEVELS, BINS + 1, 16):
        threshold = one.largest * edge / BINS
        step = threshold / (LEVELS - 1)
        rounded = np.minimum(np.round(centres / step), LEVELS - 1) * step if step else centres
        error = float((counts * (centres - rounded) ** 2).sum())
        if error < least:
            best, least = threshold, error
    return best


def _entropy(one: TensorRange) -> float:
    counts = _counts(one)
    best, least = one.largest, np.inf
    for edge in range(LEVELS, BINS + 1, 16):
        kept = counts[:edge].copy()
        kept[-1] += counts[edge:].sum()  # what is cut off is counted at the threshold
        quantised = _merge(counts[:edge], edge)
        divergence = _divergence(kept, quantised)
        if divergence < least:
            best, least = one.largest * edge / BINS, divergence
    return best


def _merge(counts: np.ndarray, edge: int) -> np.ndarray:
    """`counts` [edge] as 128 levels would show them: each level's mass spread evenly over its bins that held any."""
    level = np.arange(edge) * LEVELS // edge
    mass = np.bincount(level, counts, LEVELS)
    occupied = np.bincount(level, counts > 0, LEVELS)
    return np.where(counts > 0, (mass / np.maximum(occupied, 1))[level], 0)


def _divergence(original: np.ndarray, quantised: np.ndarray) -> float:
    if not original.sum() or not quantised.sum():
        return np.inf
    p, q = original / original.sum(), quantised / quantised.sum()
    return float(rel_entr(p, np.where((p > 0) & (q == 0), 1e-9, q)).sum())


def _counts(one: TensorRange) -> np.ndarray:
    if one.histogram is None:
        raise ValueError("these ranges were measured without histograms")
    return one.histogram


METHODS: dict[str, Callable[[TensorRange], float]] = {
    "max": lambda one: one.largest,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
