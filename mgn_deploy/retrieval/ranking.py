"""Ranking quality: CMC, mAP and mINP by the Market-1501 protocol (Zheng et al. 2015).

For each query, gallery images of junk (identity -1) are ignored, those of the query's own identity and camera
are removed, and distractors (identity 0) stay as wrong answers. What is left is ranked by distance, equal
distances by gallery index. Queries with no right answer left are counted and take no part in the averages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from mgn_deploy.datasets.dataset import DISTRACTOR, JUNK
from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.distance import TILE_BYTES, distance_rows

BLOCK_ROWS = 32  # their sorted copy stays in a core's cache


@dataclass(frozen=True)
class RankingMetrics:
    """Fractions 0 to 1 of the queries with a right answer. `rank[k]` is CMC: a right answer in the first k.

    mAP averages, per query, the precision at each right answer's rank, as torchreid and fast-reid do; the
    dataset's original MATLAB script integrates precision over recall by trapezoids and gives slightly
    different figures. mINP (Ye et al. 2021) averages the number of right answers divided by the rank of the
    last one.
    """

    rank: dict[int, float]
    mAP: float
    mINP: float
    queries: int
    queries_without_match: int

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready, with the keys rank-1 and so on, mAP, mINP, queries, queries_without_match."""
        return {
            **{f"rank-{k}": fraction for k, fraction in self.rank.items()},
            "mAP": self.mAP,
            "mINP": self.mINP,
            "queries": self.queries,
            "queries_without_match": self.queries_without_match,
        }


def evaluate(
    distances: np.ndarray,
    query_identities: ArrayLike,
    query_cameras: ArrayLike,
    gallery_identities: ArrayLike,
    gallery_cameras: ArrayLike,
    *,
    ranks: Sequence[int] = (1, 5, 10),
) -> RankingMetrics:
    """Score a distance matrix [q, g] (any floating dtype, smaller is nearer, infinity is last, memmap too).

    Identities and cameras are integers, [q] and [g]. Works on a few rows at a time, one thread a core.

    Raises:
        UserError: lengths that do not match, NaN distances, ranks below 1, no query with a right answer.
    """
    if distances.ndim != 2 or distances.dtype.kind != "f":
        form = f"{distances.dtype} {list(distances.shape)}"
        raise UserError(f"distances are {form}, but have to be floating [query, gallery]")
    answers = _Answers(distances.shape, query_identities, query_cameras, gallery_identities, gallery_cameras, ranks)
    return answers.score([(slice(0, len(distances)), distances)])


def evaluate_embeddings(
    query: np.ndarray,
    gallery: np.ndarray,
    query_identities: ArrayLike,
    query_cameras: ArrayLike,
    gallery_identities: ArrayLike,
    gallery_cameras: ArrayLike,
    *,
    ranks: Sequence[int] = (1, 5, 10),
) -> RankingMetrics:
    """Score unit-row embeddings [q, d] and [g, d] by cosine distance, never holding all distances at once.

    Raises:
        UserError: as `evaluate` and `distance.distance_matrix`.
    """
    shape = (len(query), len(gallery))
    answers = _Answers(shape, query_identities, query_cameras, gallery_identities, gallery_cameras, ranks)
    return answers.score(distance_rows(query, gallery, tile_bytes=TILE_BYTES))


class _Answers:
    """Who is right for whom. Columns are the gallery without junk, in order; `kept` are their indices."""

    def __init__(
        self,
        shape: tuple[int, ...],
        query_identities: ArrayLike,
        query_cameras: ArrayLike,
        gallery_identities: ArrayLike,
        gallery_cameras: ArrayLike,
        ranks: Sequence[int],
    ) -> None:
        if any(k < 1 for k in ranks):
            raise UserError(f"ranks are {list(ranks)}, but a rank starts at 1")
        self.ranks = ranks
        identities = _labels("query identities", query_identities, shape[0])
        self.query_cameras = _labels("query cameras", query_cameras, shape[0])
        gallery = _labels("gallery identities", gallery_identities, shape[1])
        cameras = _labels("gallery cameras", gallery_cameras, shape[1])
        self.kept = np.flatnonzero(gallery != JUNK)
        self.cameras = cameras[self.kept]
        # Columns grouped by identity: those of a query's identity are one run, [first, first + count).
        self.by_identity = np.argsort(gallery[self.kept], kind="stable")
        grouped = gallery[self.kept][self.by_identity]
        self.first = np.searchsorted(grouped, identities, side="left")
        self.count = np.searchsorted(grouped, identities, side="right") - self.first
        self.count[identities == DISTRACTOR] = 0

    def score(self, tiles: Iterable[tuple[slice, np.ndarray]]) -> RankingMetrics:
        """Metrics over tiles (rows, distances of these queries to the whole gallery, junk included)."""
        queries = len(self.count)
        first = np.zeros(queries, np.int64)  # rank of the first right answer, 0 where there is none
        precision = np.zeros(queries)
        inverse_penalty = np.zeros(queries)

        def score_block(start: int, block: np.ndarray) -> None:
            row, ranks = self._ranks(start, block)
            matched, begin, count = np.unique(row, return_index=True, return_counts=True)
            nth = np.arange(len(row)) - np.repeat(begin, count) + 1
            first[start + matched] = ranks[begin]
            precision[start + matched] = np.add.reduceat(nth / ranks, begin) / count
            inverse_penalty[start + matched] = count / ranks[begin + count - 1]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for rows, distances in tiles:
                starts = range(0, len(distances), BLOCK_ROWS)
                blocks = [distances[start : start + BLOCK_ROWS] for start in starts]
                list(pool.map(score_block, [rows.start + start for start in starts], blocks))

        matched = first > 0
        if not matched.any():
            raise UserError(
                "no query has a right answer in the gallery (same identity, another camera): "
                "check the identities and cameras, or that query and gallery belong together"
            )
        return RankingMetrics(
            rank={k: float(np.mean(first[matched] <= k)) for k in self.ranks},
            mAP=float(precision[matched].mean()),
            mINP=float(inverse_penalty[matched].mean()),
            queries=queries,
            queries_without_match=int(queries - np.count_nonzero(matched)),
        )

    def _own(self, queries: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (row within `queries`, column) of one identity, rows ascending, and whether of one camera."""
        count = self.count[queries]
        row = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = self.by_identity[self.first[queries][row] + nth]
        return row, column, self.cameras[column] == self.query_cameras[queries][row]

    def _ranks(self, start: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The right answers of the queries from `start` on: row in `block` and rank from 1, both ascending.

        A rank needs no sort of indices: it is the number of smaller distances, which sorted values give by
        bisection, plus the number of equal ones at lower columns, which only ties have to look up.
        """
        if np.isnan(np.max(block, initial=-np.inf)):
            broken = start + int(np.flatnonzero(np.isnan(block).any(axis=1))[0])
            raise UserError(f"the distances of query {broken} hold NaN: they need finite embeddings")
        row, column, removed = self._own(slice(start, start + len(block)))
        removed_row, removed_column = row[removed], column[removed]
        row, column = row[~removed], column[~removed]
        values = block[row, self.kept[column]]

        in_order = np.take(block, self.kept, axis=1)
        in_order[removed_row, removed_column] = np.inf
        in_order.sort(axis=1)
        before = np.empty(len(row), np.int64)
        bounds = np.searchsorted(row, np.arange(len(block) + 1))
        for i, (begin, end) in enumerate(pairwise(bounds)):
            before[begin:end] = np.searchsorted(in_order[i], values[begin:end])

        following = np.minimum(before + 1, len(self.kept) - 1)
        for tied in np.flatnonzero((in_order[row, following] == values) & (following > before)):
            equal = block[row[tied], self.kept[: column[tied]]] == values[tied]
            gone = removed_column[removed_row == row[tied]]
            equal[gone[gone < column[tied]]] = False
            before[tied] += np.count_nonzero(equal)
        return row, before[np.lexsort((before, row))] + 1


def _labels(name: str, labels: ArrayLike, length: int) -> np.ndarray:
    array = np.asarray(labels)
    if array.shape != (length,):
        raise UserError(f"{name} have shape {list(array.shape)}, but have to be [{length}], one an image")
    if length and array.dtype.kind not in "iu":
        raise UserError(f"{name} are {array.dtype}, but have to be integers")
    return array
