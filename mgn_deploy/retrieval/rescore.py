"""Exact similarities for the candidates of an approximate index, from the embeddings in the store."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.distance import check_finite, check_form, check_k, check_same_length, slices
from mgn_deploy.retrieval.nearest import QUERY_ROWS, Exclusion

# Gallery rows that may be nearest: of queries float32 `[q, dim]` and a number n int64 `[q, n]`, -1 where there is none.
Candidates = Callable[[np.ndarray, int], np.ndarray]
OVERFETCH = 4  # candidates for each neighbour that is wanted


def top_k_of_candidates(
    query: np.ndarray, gallery: Store, k: int, candidates: Candidates, *, excluded: Exclusion | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k best of an index's candidates by their exact inner product: indices and similarities, as `top_k`.

    The index is asked for four candidates a neighbour and for as many more as the query with the most exclusions has.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; k below 1.
    """
    check_form("query", query)
    check_finite("query", query)
    check_same_length(query.shape[1], gallery.manifest.dim)
    check_k(k)
    k = min(k, len(gallery))
    indices = np.full((len(query), k), -1, np.int64)
    similarities = np.full((len(query), k), -np.inf, np.float32)
    for rows in slices(len(query), QUERY_ROWS):
        asked = np.ascontiguousarray(query[rows], np.float32)
        left_out: list[list[int]] = [[] for _ in asked]
        if excluded is not None:
            for one, row in zip(*excluded(rows), strict=True):
                left_out[one].append(int(row))
        most = min(len(gallery), OVERFETCH * k + max(map(len, left_out)))
        for one, found in enumerate(candidates(asked, most)):
            found = np.setdiff1d(found[found >= 0], left_out[one])  # ascending: equal similarities rank by index
            values = np.asarray(gallery.take(found), np.float32) @ asked[one]
            best = np.argsort(-values, kind="stable")[:k]
            indices[rows.start + one, : len(best)] = found[best]
            similarities[rows.start + one, : len(best)] = values[best]
    return indices, similarities
