"""Ranking quality: CMC, mAP and mINP by the Market-1501 protocol (Zheng et al. 2015).

For each query, junk is ignored, images of the query's own identity and camera are removed, and distractors stay as
wrong answers (`Truth`). What is left is ranked by distance, equal distances by gallery index. Queries with no right
answer left are counted and take no part in the averages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from mgn_deploy.errors import UserError
from mgn_deploy.machine import usable_cpus
from mgn_deploy.retrieval.rows import slices
from mgn_deploy.retrieval.truth import Truth

BLOCK_ROWS = 32  # their sorted copy stays in a core's cache
RANKS = (1, 5, 10)


def metric_names(ranks: Iterable[int] = RANKS) -> list[str]:
    """What the figures of a ranking are called, in the order in which they are shown."""
    return [*(f"rank-{k}" for k in ranks), "mAP", "mINP"]


KEYS = metric_names()
NO_ANSWER = (
    "no query has a right answer in the gallery (same identity, another camera): check the identities and cameras, or "
    "that query and gallery belong together; where one camera made all images, rank without cameras (`validate` and "
    "`evaluate` do so by --no-cameras)"
)


@dataclass(frozen=True)
class QueryScores:
    """Each of q queries by itself; those without a right answer have a first rank of 0.

    Attributes:
        first_rank: int64 `[q]`, of the first right answer, from 1.
        average_precision: float64 `[q]`.
        inverse_penalty: float64 `[q]`, right answers divided by the rank of the last one (INP).
        right_answers: int64 `[q]`.
    """

    first_rank: np.ndarray
    average_precision: np.ndarray
    inverse_penalty: np.ndarray
    right_answers: np.ndarray

    @property
    def matched(self) -> np.ndarray:
        """bool `[q]`: whether there is a right answer."""
        return self.first_rank > 0

    def values(self, ranks: Iterable[int] = RANKS) -> np.ndarray:
        """What each query adds to the mean of each metric, float64 `[q, metrics]`, in the order of `metric_names`."""
        hits = [self.first_rank <= k for k in ranks]
        return np.stack([*hits, self.average_precision, self.inverse_penalty], axis=1).astype(np.float64)


@dataclass(frozen=True)
class RankingMetrics:
    """Fractions 0 to 1 of the queries with a right answer. `rank[k]` is CMC: a right answer in the first k.

    mAP averages, per query, the precision at each right answer's rank, as torchreid and fast-reid do; the
    dataset's original MATLAB script integrates precision over recall by trapezoids and gives slightly
    different figures. mINP (Ye et al. 2021) averages the number of right answers divided by the rank of the
    last one. `scores` are those of each query, where they were kept.
    """

    rank: dict[int, float]
    mAP: float
    mINP: float
    queries: int
    queries_without_match: int
    scores: QueryScores | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, scores: QueryScores, ranks: Sequence[int] = RANKS) -> RankingMetrics:
        """Average over the queries with a right answer.

        Raises:
            UserError: there is none; a rank below 1.
        """
        if any(k < 1 for k in ranks):
            raise UserError(f"ranks are {list(ranks)}, but a rank starts at 1")
        matched = scores.matched
        if not matched.any():
            raise UserError(NO_ANSWER)
        *hits, precision, inverse_penalty = (float(column.mean()) for column in scores.values(ranks)[matched].T)
        return cls(
            rank=dict(zip(ranks, hits, strict=True)),
            mAP=precision,
            mINP=inverse_penalty,
            queries=len(matched),
            queries_without_match=int(len(matched) - np.count_nonzero(matched)),
            scores=scores,
        )

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready, with the keys rank-1 and so on, mAP, mINP, queries, queries_without_match."""
        return {
            **dict(zip(metric_names(self.rank), (*self.rank.values(), self.mAP, self.mINP), strict=True)),
            "queries": self.queries,
            "queries_without_match": self.queries_without_match,
        }


def evaluate(
    distances: np.ndarray,
    query_identities: ArrayLike,
    query_cameras: ArrayLike | None,
    gallery_identities: ArrayLike,
    gallery_cameras: ArrayLike | None,
    *,
    ranks: Sequence[int] = RANKS,
    junk: Collection[int] = (),
    distractors: Collection[int] = (),
) -> RankingMetrics:
    """Score a distance matrix [q, g] (any floating dtype, smaller is nearer, infinity is last, memmap too).

    Identities and cameras are integers, [q] and [g]; cameras None: every other image of a person is a right answer.
    Every identity is a person's but those of `junk` and `distractors`. Works on a few rows at a time, a thread a core.

    Raises:
        UserError: lengths that do not match, NaN distances, ranks below 1, no query with a right answer.
    """
    if distances.ndim != 2 or distances.dtype.kind != "f":
        form = f"{distances.dtype} {list(distances.shape)}"
        raise UserError(f"distances are {form}, but have to be floating [query, gallery]")
    truth = Truth(
        query_identities,
        query_cameras,
        gallery_identities,
        gallery_cameras,
        junk=junk,
        distractors=distractors,
        shape=distances.shape,
    )
    return RankingMetrics.of(score_rows([(slice(0, len(distances)), distances)], truth), ranks)


def score_rows(tiles: Iterable[tuple[slice, np.ndarray]], truth: Truth) -> QueryScores:
    """Score queries over tiles (rows, distances of these queries to the whole gallery, junk included).

    Raises:
        UserError: NaN distances.
    """
    queries = truth.shape[0]
    scores = QueryScores(np.zeros(queries, np.int64), np.zeros(queries), np.zeros(queries), np.zeros(queries, np.int64))

    def score_block(first: int, block: np.ndarray) -> None:
        row, ranks = _ranks(truth, first, block)
        matched, begin, count = np.unique(row, return_index=True, return_counts=True)
        nth = np.arange(len(row)) - np.repeat(begin, count) + 1
        here = first + matched
        scores.first_rank[here] = ranks[begin]
        scores.average_precision[here] = np.add.reduceat(nth / ranks, begin) / count
        scores.inverse_penalty[here] = count / ranks[begin + count - 1]
        scores.right_answers[here] = count

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for rows, distances in tiles:
            blocks = list(slices(len(distances), BLOCK_ROWS))
            firsts = [rows.start + block.start for block in blocks]
            list(pool.map(score_block, firsts, [distances[block] for block in blocks]))
    return scores


def _ranks(truth: Truth, start: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The right answers of the queries from `start` on: row in `block` and rank from 1, both ascending.

    A rank needs no sort of indices: it is the number of smaller distances, which sorted values give by bisection, plus
    the number of equal ones at lower columns, which only ties have to look up. What is farther than a query's last
    right answer is not sorted at all.
    """
    if np.isnan(np.max(block, initial=-np.inf)):
        broken = start + int(np.flatnonzero(np.isnan(block).any(axis=1))[0])
        raise UserError(f"the distances of query {broken} hold NaN: they need finite embeddings")
    row, column, removed = truth.own(slice(start, start + len(block)))
    removed_row, removed_column = row[removed], column[removed]
    row, column = row[~removed], column[~removed]
    values = block[row, truth.kept[column]]

    ranked = np.zeros(block.shape[1], bool)
    ranked[truth.kept] = True
    before, equal = np.empty(len(row), np.int64), np.empty(len(row), np.int64)
    bounds = np.searchsorted(row, np.arange(len(block) + 1))
    gone = np.searchsorted(removed_row, np.arange(len(block) + 1))
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        wanted = block[i] <= values[begin:end].max()
        wanted &= ranked
        wanted[truth.kept[removed_column[gone[i] : gone[i + 1]]]] = False
        near = block[i, np.flatnonzero(wanted)]
        near.sort()
        before[begin:end] = np.searchsorted(near, values[begin:end])
        equal[begin:end] = np.searchsorted(near, values[begin:end], side="right") - before[begin:end]

    for tied in np.flatnonzero(equal > 1):
        same = block[row[tied], truth.kept[: column[tied]]] == values[tied]
        theirs = removed_column[gone[row[tied]] : gone[row[tied] + 1]]
        same[theirs[theirs < column[tied]]] = False
        before[tied] += np.count_nonzero(same)
    return row, before[np.lexsort((before, row))] + 1
