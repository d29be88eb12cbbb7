"""CUHK03's classic protocol (Li et al., "DeepReID", CVPR 2014): one gallery image a person, drawn again and again.

torchreid draws for each query anew (`use_metric_cuhk03`, 10 times). Here, as in the paper, a draw is one gallery for
all queries, 100 times, except that a query's own person is drawn from the images that another camera made of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.truth import Truth

RANKS = (1, 5, 10, 20)
REPEATS = 100


@dataclass(frozen=True)
class SingleShot:
    """CMC of a gallery of one image a person, as fractions of the queries with a right answer.

    Attributes:
        rank: the mean over the draws.
        deviation: the standard deviation from draw to draw.
        repeats: how many draws.
        people: of the gallery; junk is nobody, and all distractors of one number are one.
    """

    rank: dict[int, float]
    deviation: dict[int, float]
    repeats: int
    people: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys rank-1 and so on, their deviations, repeats and people."""
        return {
            **{f"rank-{k}": value for k, value in self.rank.items()},
            "deviation": {f"rank-{k}": value for k, value in self.deviation.items()},
            "repeats": self.repeats,
            "people": self.people,
        }


def single_shot(
    tiles: Iterable[tuple[slice, np.ndarray]],
    truth: Truth,
    *,
    ranks: Sequence[int] = RANKS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> SingleShot:
    """Score distances by galleries of one random image a person.

    Args:
        tiles: (rows, distances of these queries to the whole gallery).
        truth: who is who.
        ranks: whose CMC is wanted.
        repeats: how many galleries.
        seed: of the draws: image floor(u x n) of each person's n, u being row by row `default_rng(seed).random`.

    Raises:
        UserError: no query has a right answer.
    """
    people, first, counts = np.unique(truth.identities[truth.by_identity], return_index=True, return_counts=True)
    draws = np.random.default_rng(seed).random((repeats, len(people)))
    drawn = truth.by_identity[first + (draws * counts).astype(np.int64)]  # columns [repeats, people]
    hits = np.zeros((repeats, len(ranks)))
    queries = 0
    for rows, distances in tiles:
        row, column, removed = truth.own(rows)
        row, column = row[~removed], column[~removed]
        asking, begin, count = np.unique(row, return_index=True, return_counts=True)
        if not len(asking):
            continue
        queries += len(asking)
        person = np.searchsorted(people, truth.query_identities[rows][asking])
        near = distances[asking][:, truth.kept]
        every = np.arange(len(asking))
        for repeat in range(repeats):
            own = column[begin + (draws[repeat, person] * count).astype(np.int64)]
            value = near[every, own][:, None]
            others = near[:, drawn[repeat]]
            closer = (others < value) | ((others == value) & (drawn[repeat] < own[:, None]))
            closer[every, person] = False
            rank = 1 + np.count_nonzero(closer, axis=1)
            hits[repeat] += [np.count_nonzero(rank <= k) for k in ranks]
    if not queries:
        raise UserError("no query has a right answer in the gallery: single-shot has nothing to draw for it")
    cmc = hits / queries
    return SingleShot(
        {k: float(cmc[:, index].mean()) for index, k in enumerate(ranks)},
        {k: float(cmc[:, index].std()) for index, k in enumerate(ranks)},
        repeats,
        len(people),
    )
