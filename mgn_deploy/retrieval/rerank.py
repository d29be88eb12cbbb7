"""Re-ranking by k-reciprocal encodings, whose Jaccard distance is mixed with the original one (`encodings.py`).

Neighbours are looked for among queries and gallery together. Equations are those of Zhong et al., CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mgn_deploy.choices import Device
from mgn_deploy.errors import UserError
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays, first_largest
from mgn_deploy.retrieval.encodings import K1, K2, encode
from mgn_deploy.retrieval.rows import check_embeddings, check_k, slices

WEIGHT = 0.3  # the authors', as K1 and K2
LEAST_QUERIES, MOST_QUERIES = 256, 1024  # whose distances are computed at a time
QUERY_VALUES = 1 << 25  # of them, where these are enough queries


def rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    k1: int = K1,
    k2: int = K2,
    weight: float = WEIGHT,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """Compute all re-ranked distances, float32 `[q, g]`, 0 to 1; `rerank_rows` and `rerank_top_k` need no such matrix.

    Args:
        query, gallery: embeddings `[q, d]` and `[g, d]`, float32 or float16.
        k1, k2: as of `encode`.
        weight: lambda, the original distance's share (equation 12).
        device: where the nearest neighbours and original distances are computed.
        progress: called with the tiles of neighbours and then the queries done.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; k1, k2 or weight out of range.
    """
    out = np.empty((len(query), len(gallery)), np.float32)
    for rows, distances in rerank_rows(query, gallery, k1=k1, k2=k2, weight=weight, device=device, progress=progress):
        out[rows] = distances
    return out


def rerank_top_k(
    query: np.ndarray,
    gallery: np.ndarray,
    k: int,
    *,
    excluded: Callable[[slice], np.ndarray] | None = None,
    k1: int = K1,
    k2: int = K2,
    weight: float = WEIGHT,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k gallery rows of smallest re-ranked distance: indices int64 and distances float32, `[q, min(k, g)]`.

    Best first, equal distances by lower index. `excluded(rows)` is a bool `[rows, g]` mask of gallery rows not to
    return for these queries; they take part in the re-ranking. Where a query runs out of candidates, the index is -1
    and the distance infinite.

    Raises:
        UserError: as `rerank`; k below 1.
    """
    check_k(k)
    k = min(k, len(gallery))
    indices, best = np.empty((len(query), k), np.int64), np.empty((len(query), k), np.float32)
    for rows, distances in rerank_rows(query, gallery, k1=k1, k2=k2, weight=weight, device=device, progress=progress):
        if excluded is not None:
            distances[excluded(rows)] = np.inf
        columns = first_largest(-distances, k)
        values = np.take_along_axis(distances, columns, axis=1)
        order = np.argsort(values, axis=1, kind="stable")
        best[rows] = np.take_along_axis(values, order, axis=1)
        indices[rows] = np.take_along_axis(columns, order, axis=1)
    indices[np.isinf(best)] = -1
    return indices, best


def rerank_rows(
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    k1: int = K1,
    k2: int = K2,
    weight: float = WEIGHT,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Compute the rows of `rerank` a few queries at a time: (rows, float32 `[rows, g]`), each array the caller's own.

    Raises:
        UserError: as `rerank`.
    """
    check_embeddings(query, gallery, "euclidean")
    if not 0 <= weight <= 1:
        raise UserError(f"the original distance's weight is {weight}, but has to be from 0 to 1")
    images = np.concatenate([query, gallery])
    encodings = encode(images, k1=k1, k2=k2, device=device, progress=progress)
    height = max(LEAST_QUERIES, min(MOST_QUERIES, QUERY_VALUES // len(images)))
    for rows in slices(len(query), height):
        distances = encodings.jaccard(rows)[:, len(query) :]
        if weight:
            distances *= 1 - weight
            encodings.add_original(images, rows, slice(len(query), len(images)), weight, distances)
        yield rows, distances
        if progress:
            progress("re-ranking", rows.stop, len(query))
