"""How sure a figure is, and whether two differ: queries are what is resampled.

Bootstrap intervals are percentiles (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Two
rankings of the same queries are compared by flipping the signs of their differences, query by query: a permutation test
for paired data (Smucker et al., "A Comparison of Statistical Significance Tests for Information Retrieval Evaluation",
CIKM 2007, section 2.2). Queries of one person are no independent draws, so that intervals are rather too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.ranking import KEYS, QueryScores

LEVEL = 0.95
RESAMPLES = 2000
FLIPS = 10_000
BLOCK_VALUES = 1 << 22

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Of one metric, first minus second ranking, over the queries that both have an answer to.

    Attributes:
        mean: as a fraction.
        interval: of the mean, at `LEVEL`.
        p: how often differences whose signs are random are as far from 0; 1 where there is none.
    """

    mean: float
    interval: Interval
    p: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"mean": self.mean, "ci95": list(self.interval), "p": self.p}


def confidence_intervals(scores: QueryScores, *, seed: int = 0) -> dict[str, Interval]:
    """Intervals of rank-k, mAP and mINP at `LEVEL`, as fractions.

    Raises:
        UserError: no query has a right answer.
    """
    values = scores.values()[scores.matched]
    if not len(values):
        raise UserError("no query has a right answer: there is nothing to be sure of")
    low, high = (ends.tolist() for ends in _interval(values, seed))
    return dict(zip(KEYS, zip(low, high, strict=True), strict=True))


def compare(first: QueryScores, second: QueryScores, *, flips: int = FLIPS) -> dict[str, Difference]:
    """Compare two rankings of the same queries, metric by metric.

    Raises:
        UserError: another number of queries, or none that both have an answer to.
    """
    if len(first.first_rank) != len(second.first_rank):
        raise UserError(
            f"one ranking has {len(first.first_rank)} queries and the other {len(second.first_rank)}: "
            "only rankings of the same queries are compared query by query"
        )
    both = first.matched & second.matched
    if not both.any():
        raise UserError("no query has a right answer in both rankings: there is nothing to compare")
    values = first.values()[both] - second.values()[both]
    mean = values.mean(axis=0)
    low, high = _interval(values, seed=0)
    farther = np.zeros(len(mean), np.int64)
    rng = np.random.default_rng(0)
    for height in _heights(flips, len(values)):
        signs = rng.integers(0, 2, (height, len(values)), dtype=np.int8).astype(np.float64) * 2 - 1
        farther += np.count_nonzero(np.abs(signs @ values / len(values)) >= np.abs(mean) - 1e-12, axis=0)
    p = (farther + 1) / (flips + 1)
    return {
        name: Difference(float(mean[i]), (float(low[i]), float(high[i])), float(p[i])) for i, name in enumerate(KEYS)
    }


def _interval(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = len(values)
    means = [rng.multinomial(n, np.full(n, 1 / n), size=height) @ values / n for height in _heights(RESAMPLES, n)]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return low, high


def _heights(total: int, width: int) -> Iterator[int]:
    """Row counts of blocks that make up `total` rows of `width` values."""
    step = max(1, BLOCK_VALUES // width)
    for start in range(0, total, step):
        yield min(step, total - start)
