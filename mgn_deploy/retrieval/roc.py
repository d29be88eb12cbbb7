"""Verification: are these two images of one person? ROC curve, TPR at fixed FPR, and EER, over all pairs of a ranking.

The pairs are fast-reid's (github.com/JDAI-CV/fast-reid, fastreid/evaluation/roc.py): every query with every gallery
image that the protocol leaves it. A pair is accepted where its distance is at most the threshold, and as everywhere in
biometrics (ISO/IEC 19795-1) TPR is the share of one person's pairs that are accepted, FPR that of two people's.

fast-reid's own "TPR@FPR" has the roles reversed: it hands scikit-learn distances as scores and different people as the
positive class, so that its FPR is the share of one person's pairs that are rejected and its TPR that of two people's
pairs that are rejected. `Roc.fast_reid` is that number, for comparison with published ones.

Exact for any number of pairs: the distances of one person's pairs are kept and sorted, those of two people's are only
counted against them, in a second pass over the distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.machine import usable_cpus
from mgn_deploy.retrieval.truth import Truth

RATES = (1e-2, 1e-3, 1e-4, 1e-5)
BLOCK_ROWS = 128

Tiles = Iterable[tuple[slice, np.ndarray]]


@dataclass(frozen=True)
class Roc:
    """The curve's points at the distances of one person's pairs, ascending; between two of them TPR is constant.

    Attributes:
        thresholds: the p distinct distances.
        same: int64 `[p]`, pairs of one person at most so far apart.
        closer, different: int64 `[p]`, pairs of two people closer than that, and at most so far apart.
        same_pairs, different_pairs: how many there are in all.
    """

    thresholds: np.ndarray = field(repr=False)
    same: np.ndarray = field(repr=False)
    closer: np.ndarray = field(repr=False)
    different: np.ndarray = field(repr=False)
    same_pairs: int
    different_pairs: int

    @property
    def fpr(self) -> np.ndarray:
        """float64 `[p]`."""
        return self.different / self.different_pairs

    @property
    def tpr(self) -> np.ndarray:
        """float64 `[p]`."""
        return self.same / self.same_pairs

    def tpr_at(self, fpr: float) -> float | None:
        """The largest TPR whose FPR is at most this; None where there are not even 1 / fpr pairs of two people."""
        if fpr * self.different_pairs < 1 - 1e-9:
            return None
        point = self._point(fpr)
        return float(self.tpr[point]) if point >= 0 else 0.0

    def threshold_at(self, fpr: float) -> float | None:
        """The largest of `thresholds` whose FPR is at most this; None as `tpr_at`, or where there is none."""
        point = self._point(fpr)
        return float(self.thresholds[point]) if point >= 0 and self.tpr_at(fpr) is not None else None

    def eer(self) -> float:
        """Equal error rate: where FPR and 1 - TPR meet, on straight lines between the curve's points."""
        missed = 1 - self.tpr
        point = int(np.argmax(self.fpr >= missed))  # the last one misses nobody
        missed_before = missed[point - 1] if point else 1.0
        before = self.closer[point] / self.different_pairs
        if before >= missed_before:
            return float(missed_before)
        part = (missed_before - before) / (missed_before - before + self.fpr[point] - missed[point])
        return float(before + part * (self.fpr[point] - before))

    def fast_reid(self, rate: float) -> float:
        """What fast-reid prints as TPR@FPR of this rate, with the point that it takes: the nearest one that
        scikit-learn's `roc_curve` keeps."""
        rejected = self.same_pairs - np.concatenate([[0], self.same[:-1]])  # at least so far apart
        farther = self.different_pairs - self.closer
        count, ties = np.diff(self.same, prepend=0), self.different - self.closer
        # From the largest distance on. A point is dropped where the step to it and the one behind it are the same.
        adjacent = self.closer[1:] == self.different[:-1]
        same_step = (count[1:] == count[:-1]) & (ties[1:] == ties[:-1])
        dropped = np.concatenate([[False], adjacent & same_step])
        farthest_of_all = self.different[-1] == self.different_pairs
        dropped[-1] &= not farthest_of_all  # the first point of all stays
        rates = np.concatenate([[0], rejected[::-1][~dropped[::-1]] / self.same_pairs])
        shares = np.concatenate([[0], farther[::-1][~dropped[::-1]] / self.different_pairs])
        return float(shares[np.argmin(np.abs(rates - rate))])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a rate that there are too few pairs to measure is None."""
        return {
            "same_pairs": self.same_pairs,
            "different_pairs": self.different_pairs,
            "tpr_at_fpr": {f"{rate:.0e}": self.tpr_at(rate) for rate in RATES},
            "threshold_at_fpr": {f"{rate:.0e}": self.threshold_at(rate) for rate in RATES},
            "eer": self.eer(),
            "fast_reid_tpr_at_fpr": {f"{rate:.0e}": self.fast_reid(rate) for rate in RATES},
        }

    def _point(self, fpr: float) -> int:
        allowed = fpr * self.different_pairs * (1 + 1e-12)
        return int(np.searchsorted(self.different, allowed, side="right")) - 1


def roc(tiles: Callable[[], Tiles], truth: Truth) -> Roc:
    """Make the curve of all pairs of queries who are somebody.

    Args:
        tiles: called twice; gives (rows, distances of these queries to the whole gallery).
        truth: who is who.

    Raises:
        UserError: no pair of one person, or none of two.
    """
    found = [np.empty(0, np.float32)]
    for rows, distances in tiles():
        row, column, removed = truth.own(rows)
        found.append(distances[row[~removed], truth.kept[column[~removed]]])
    values = np.concatenate(found)
    thresholds, counts = np.unique(values, return_counts=True)
    closer, different = np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds), np.int64)
    total = 0
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for rows, distances in tiles():
            starts = range(0, len(distances), BLOCK_ROWS)
            firsts = [rows.start + start for start in starts]
            blocks = [distances[start : start + BLOCK_ROWS] for start in starts]
            for less, at_most, all_of_them in pool.map(partial(_count, truth, thresholds), firsts, blocks):
                closer += less
                different += at_most
                total += all_of_them
    if not len(values) or not total:
        raise UserError(f"there are {len(values)} pairs of one person and {total} of two: a ROC curve needs both")
    return Roc(thresholds, np.cumsum(counts), closer, different, len(values), total)


def _count(truth: Truth, thresholds: np.ndarray, start: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs of two people below each threshold, at most at it, and in all."""
    somebody = ~truth.nobody[start : start + len(block)]
    row, column, _ = truth.own(slice(start, start + len(block)))
    others = np.ones((len(block), len(truth.kept)), bool)
    others[row, column] = False
    others[~somebody] = False
    values = block[:, truth.kept][others]
    values.sort()
    return np.searchsorted(values, thresholds), np.searchsorted(values, thresholds, side="right"), len(values)
