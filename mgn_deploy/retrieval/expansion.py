"""Query expansion: an embedding is replaced by a weighted mean of itself and its nearest gallery images.

Alpha query expansion is Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2018,
section 4.3: weights are similarities to the power of alpha. Database-side augmentation does the same to the gallery
(Turcot and Lowe, 2009; with these weights Gordo et al., IJCV 2017). Negative similarities weigh nothing.
"""

from __future__ import annotations

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.nearest import Exclusion, top_k

ALPHA = 3.0  # the paper's


def expand_queries(
    query: np.ndarray, gallery: np.ndarray, k: int, *, alpha: float = ALPHA, excluded: Exclusion | None = None
) -> np.ndarray:
    """Each query with its k nearest gallery rows, the query itself weighing 1: float32 `[q, d]`, unit rows.

    Args:
        query, gallery: embeddings `[q, d]` and `[g, d]`, unit rows.
        k: gallery rows a query.
        alpha: the similarities' power; 0 gives all the same weight.
        excluded: gallery rows that a query must not get, as in `top_k`.

    Raises:
        UserError: k below 1, alpha below 0, or what `top_k` refuses.
    """
    indices, similarities = top_k(query, gallery, k, excluded=excluded)
    return _mean(gallery, indices, similarities, alpha, np.asarray(query, np.float32))


def augment_gallery(gallery: np.ndarray, k: int, *, alpha: float = ALPHA) -> np.ndarray:
    """Each gallery row as the mean of its k nearest, itself among them: float32 `[g, d]`, unit rows.

    Of queries and gallery together this is what fast-reid calls AQE.

    Raises:
        UserError: as `expand_queries`.
    """
    indices, similarities = top_k(gallery, gallery, k)
    return _mean(gallery, indices, similarities, alpha, np.zeros((len(gallery), gallery.shape[1]), np.float32))


def _mean(
    gallery: np.ndarray, indices: np.ndarray, similarities: np.ndarray, alpha: float, start: np.ndarray
) -> np.ndarray:
    """`start` plus the weighted rows of each query's neighbours, of unit length."""
    if not alpha >= 0:
        raise UserError(f"alpha is {alpha}, but has to be at least 0")
    weights = np.where(indices < 0, 0, np.maximum(similarities, 0) ** np.float32(alpha))
    total = np.array(start)
    for rank in range(indices.shape[1]):
        total += weights[:, rank, None] * np.asarray(gallery[indices[:, rank]], np.float32)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
