"""Exact nearest neighbours by FAISS (Douze et al., "The Faiss library", 2024), a block of the gallery at a time.

FAISS is exact here: it multiplies every query with every gallery row. What it leaves open is decided here: equal
similarities rank by gallery index, at the last rank too, and rows that are left out are made up for by asking for more.
What an approximate index finds is compared exactly, too, by the embeddings in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.rows import TILE_BYTES, check_finite, check_form, check_k, check_same_length, slices

# For the queries of a slice, gallery rows to leave out: (query within the slice, gallery row), int64 `[n]` each.
Exclusion = Callable[[slice], tuple[np.ndarray, np.ndarray]]
# Gallery rows that may be nearest: of queries float32 `[q, dim]` and a number n int64 `[q, n]`, -1 where there is none.
Candidates = Callable[[np.ndarray, int], np.ndarray]


QUERY_ROWS = 1024
SPARE = 16  # neighbours asked for beyond those that are wanted: most ties and exclusions cost no second search
OVERFETCH = 4  # candidates of an index for each neighbour that is wanted


def top_k(
    query: np.ndarray,
    gallery: np.ndarray | Store,
    k: int,
    *,
    excluded: Exclusion | None = None,
    block_bytes: int = TILE_BYTES,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k gallery rows of largest inner product, exactly: indices and similarities.

    Both are [q, k'], int64 and float32, best first, equal similarities by lower gallery index, at rank k too;
    k' = min(k, g). Where a query runs out of candidates, the index is -1 and the similarity -inf.

    Args:
        query, gallery: embeddings `[q, d]` and `[g, d]`, float32 or float16. A gallery that is a store or mapped from
            disk is read once, block by block, and may be larger than memory.
        k: at least 1.
        excluded: the gallery rows that some queries must not get.
        block_bytes: of gallery rows in float32, at once.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; k below 1.
    """
    check_form("query", query)
    check_finite("query", query)
    if isinstance(gallery, np.ndarray):
        check_form("gallery", gallery)
    elif not len(gallery):
        raise UserError("the gallery holds no embedding: embed some images first")
    check_k(k)
    k = min(k, len(gallery))
    indices = np.full((len(query), k), -1, np.int64)
    similarities = np.full((len(query), k), -np.inf, np.float32)
    asked = np.ascontiguousarray(query, np.float32)
    parts = list(slices(len(query), QUERY_ROWS))
    without = [_keys(excluded, rows, len(gallery)) for rows in parts]
    for start, block in _blocks(gallery, max(1, block_bytes // (4 * query.shape[1]))):
        check_same_length(query.shape[1], block.shape[1])
        check_finite("gallery", block, start)
        for rows, left_out in zip(parts, without, strict=True):
            found, values = _best_of_block(asked[rows], block, k, left_out, start, len(gallery))
            # Earlier blocks first, each by index: so a stable sort leaves equal values by index.
            values = np.concatenate([similarities[rows], values], axis=1)
            found = np.concatenate([indices[rows], found], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :k]
            similarities[rows] = np.take_along_axis(values, order, axis=1)
            indices[rows] = np.take_along_axis(found, order, axis=1)
    return indices, similarities


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


def _best_of_block(
    query: np.ndarray, block: np.ndarray, k: int, left_out: np.ndarray, start: int, gallery: int
) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` of one block, as many columns as k and the block allow; -1 and -inf where there is none.

    FAISS promises nothing of those that tie at the last rank, so a query is answered once the last value that it was
    given is below its k-th one; the others are asked again for twice as many.
    """
    import faiss

    k = min(k, len(block))
    indices = np.full((len(query), k), -1, np.int64)
    similarities = np.full((len(query), k), -np.inf, np.float32)
    open_rows, fetched = np.arange(len(query)), min(k + SPARE, len(block))
    while len(open_rows):
        values, found = faiss.knn(query[open_rows], block, fetched, metric=faiss.METRIC_INNER_PRODUCT)
        last = values[:, -1].copy()
        found = found.astype(np.int64) + start
        gone = np.isin(open_rows[:, None] * gallery + found, left_out) if len(left_out) else np.zeros_like(found, bool)
        values[gone], found[gone] = -np.inf, -1
        order = np.lexsort((found, -values), axis=1)[:, :k]
        values, found = np.take_along_axis(values, order, axis=1), np.take_along_axis(found, order, axis=1)
        answered = (values[:, -1] > last) | (fetched == len(block))
        indices[open_rows[answered]], similarities[open_rows[answered]] = found[answered], values[answered]
        open_rows, fetched = open_rows[~answered], min(2 * fetched, len(block))
    return indices, similarities


def _blocks(gallery: np.ndarray | Store, height: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the rows, contiguous float32, of blocks of about `height` rows."""
    if isinstance(gallery, np.ndarray):
        parts: Iterable[np.ndarray] = (gallery[rows] for rows in slices(len(gallery), height))
    else:
        parts = (block for _, block in gallery.blocks())
    start, waiting = 0, list[np.ndarray]()
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= height:
            yield start, _float32(waiting)
            start += sum(map(len, waiting))
            waiting.clear()
    if waiting:
        yield start, _float32(waiting)


def _float32(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts), np.float32)


def _keys(excluded: Exclusion | None, rows: slice, gallery: int) -> np.ndarray:
    """Pairs that are left out as one number each: query within `rows` times gallery, plus gallery row."""
    if excluded is None:
        return np.empty(0, np.int64)
    row, column = excluded(rows)
    return np.asarray(row, np.int64) * gallery + np.asarray(column, np.int64)
