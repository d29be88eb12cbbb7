"""How alike two engines' embeddings of the same images are."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend

BATCH = 8
# Neighbours whose similarity is this close to the tenth's are equally right: float32 sums differ by this much.
TIE = 2e-6


def run_in_batches(backend: Backend, crops: np.ndarray, size: int = BATCH) -> np.ndarray:
    """Embeddings of all crops; the last batch is shorter, so two batch sizes are run."""
    return np.concatenate([backend(np.ascontiguousarray(crops[at : at + size])) for at in range(0, len(crops), size)])


def top_agreement(embeddings: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Mean share of each row's k nearest other rows that are among the reference's k nearest (or tie with its k-th)."""
    k = min(k, len(reference) - 1)
    expected = reference.astype(np.float64) @ reference.T.astype(np.float64)
    found = embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)
    np.fill_diagonal(expected, -np.inf)
    np.fill_diagonal(found, -np.inf)
    neighbours = np.argpartition(-found, k - 1, axis=1)[:, :k]
    kth = np.partition(expected, -k, axis=1)[:, -k]
    return float((np.take_along_axis(expected, neighbours, axis=1) >= kth[:, None] - TIE).mean())


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of each row with its counterpart, float64 `[n]`."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    return (first * second).sum(axis=1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)).clip(1e-12)
