"""From a similarity to evidence: log(P(similarity | same person) / P(similarity | two people)).

The evidence does not depend on how many pairs of a data set are genuine; a probability does, by the prior that is
added to it: logit(P(same | similarity)) = evidence + logit(prior) (Brümmer and du Preez, "Application-independent
evaluation of speaker detection", Computer Speech and Language 2006). Two ways to learn it are here, and
`cross_validated` tells which one is better on people that it has not seen:

- Platt's: a line (Platt 1999, with the targets of that paper; Newton's method as in Lin, Lin and Weng 2007).
- isotonic: the pool-adjacent-violators algorithm (Zadrozny and Elkan 2002), between the centres of whose blocks the
  evidence is interpolated (Oron and Flournoy, "Centered isotonic regression", 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mgn_deploy.identity.pairs import Pairs

Method = Literal["platt", "isotonic"]
# Knots of a piecewise linear function: similarity, evidence. Outside of them the outer values hold.
Knots = list[tuple[float, float]]

_BINS = 4096  # into which similarities are counted before blocks are pooled
FOLDS = 5


def evidence(similarities: np.ndarray | float, knots: Knots) -> np.ndarray:
    """The evidence of similarities of any shape, float64."""
    at, values = np.array(knots, np.float64).T
    return np.interp(np.asarray(similarities, np.float64), at, values)


def probability(evidence: np.ndarray | float, prior: float) -> np.ndarray:
    """P(same person) where a pair is genuine with the chance `prior` before it is looked at."""
    from_prior = np.log(prior) - np.log1p(-prior)
    return np.asarray(1 / (1 + np.exp(-(np.asarray(evidence, np.float64) + from_prior))))


def fit_platt(genuine: np.ndarray, impostor: np.ndarray) -> Knots:
    """A line from similarities `[n]` and `[m]`, both kinds with half of the weight."""
    similarities = np.concatenate([genuine, impostor]).astype(np.float64)
    high, low = (len(genuine) + 1) / (len(genuine) + 2), 1 / (len(impostor) + 2)
    targets = np.repeat([high, low], [len(genuine), len(impostor)])
    weights = np.repeat([0.5 / len(genuine), 0.5 / len(impostor)], [len(genuine), len(impostor)])
    centre, scale = similarities.mean(), similarities.std() or 1.0
    x = (similarities - centre) / scale

    def loss(slope: float, offset: float) -> float:
        z = slope * x + offset
        return float(weights @ (np.logaddexp(0, z) - targets * z))

    slope, offset = 0.0, 0.0
    for _ in range(100):
        p = 1 / (1 + np.exp(-(slope * x + offset)))
        error, curvature = weights * (p - targets), weights * p * (1 - p)
        gradient = np.array([error @ x, error.sum()])
        hessian = np.array([[curvature @ x**2, curvature @ x], [curvature @ x, curvature.sum()]])
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        if gradient @ step < 1e-12:  # twice what the loss can still fall
            break
        factor, before = 1.0, loss(slope, offset)
        while factor > 1e-4 and loss(slope - factor * step[0], offset - factor * step[1]) > before:
            factor /= 2
        slope, offset = slope - factor * step[0], offset - factor * step[1]
    slope = max(slope / scale, 1e-9)  # more alike is never evidence against
    offset -= slope * centre
    low, high = _bounds(len(genuine), len(impostor))
    at = sorted({-1.0, 1.0, *(x for x in ((low - offset) / slope, (high - offset) / slope) if -1 < x < 1)})
    return [(x, float(np.clip(slope * x + offset, low, high))) for x in at]


def fit_isotonic(genuine: np.ndarray, impostor: np.ndarray) -> Knots:
    """A rising curve from similarities `[n]` and `[m]`, both kinds with half of the weight."""
    both = np.concatenate([genuine, impostor]).astype(np.float64)
    # As many impostors as are needed for bins, by rank: of millions the quantiles are those of some.
    few = np.sort(impostor)[:: max(1, len(impostor) // 100_000)]
    edges = np.unique(np.quantile(np.concatenate([genuine, few]), np.linspace(0, 1, _BINS + 1)))
    which = np.clip(np.searchsorted(edges, both, side="right") - 1, 0, len(edges) - 1)
    is_genuine = np.repeat([1.0, 0.0], [len(genuine), len(impostor)])
    counts = np.stack(
        [
            np.bincount(which, is_genuine, len(edges)),
            np.bincount(which, 1 - is_genuine, len(edges)),
            np.bincount(which, both, len(edges)),
        ],
        axis=1,
    )
    blocks = pool_adjacent_violators(counts[counts[:, :2].sum(axis=1) > 0], len(genuine), len(impostor))
    same, other, total = blocks.T
    values = np.log((same + 0.5) / (len(genuine) + 1)) - np.log((other + 0.5) / (len(impostor) + 1))
    low, high = _bounds(len(genuine), len(impostor))
    values = np.maximum.accumulate(np.clip(values, low, high))
    return [(float(x), float(y)) for x, y in zip(total / (same + other), values, strict=True)]


def pool_adjacent_violators(counts: np.ndarray, genuine: int, impostor: int) -> np.ndarray:
    """Merge neighbouring bins until the share of genuine pairs rises from each block to the next.

    Args:
        counts: `[bins, 3]` by rising similarity: genuine pairs, impostor pairs, the sum of their similarities.
        genuine, impostor: how many of each kind weigh as much as all of the other.

    Returns:
        The blocks, `[blocks, 3]` alike.
    """
    blocks: list[np.ndarray] = []

    def share(block: np.ndarray) -> float:
        same, other = block[0] / genuine, block[1] / impostor
        return float(same / (same + other))

    for row in counts:
        block = row
        while blocks and share(blocks[-1]) >= share(block):
            block = block + blocks.pop()
        blocks.append(block)
    return np.array(blocks)


FITS: dict[Method, Callable[[np.ndarray, np.ndarray], Knots]] = {"platt": fit_platt, "isotonic": fit_isotonic}


@dataclass(frozen=True)
class CrossValidated:
    """A method on people that it was not fitted on.

    Attributes:
        brier, log_loss: mean squared error and mean -log of the probabilities (natural), the genuine pairs with the
            weight of the prior.
        genuine, impostor: the probabilities of the held-out pairs.
    """

    brier: float
    log_loss: float
    genuine: np.ndarray
    impostor: np.ndarray


def cross_validated(
    genuine: Pairs, impostor: Pairs, people: int, prior: float, seed: int = 0
) -> dict[Method, CrossValidated]:
    """Both methods by five folds of people: fitted on the pairs of four folds, tried on those within the fifth."""
    folds = np.random.default_rng(seed).permutation(people) % FOLDS
    same, first, second = folds[genuine.first], folds[impostor.first], folds[impostor.second]
    results: dict[Method, CrossValidated] = {}
    for name, fit in FITS.items():
        held = []
        for fold in range(FOLDS):
            outside = genuine.similarities[same != fold], impostor.similarities[(first != fold) & (second != fold)]
            inside = genuine.similarities[same == fold], impostor.similarities[(first == fold) & (second == fold)]
            if min(map(len, outside)):
                knots = fit(*outside)
                held.append([probability(evidence(one, knots), prior) for one in inside])
        p, q = (np.concatenate(kind) for kind in zip(*held, strict=True))
        results[name] = CrossValidated(
            prior * float(np.mean((1 - p) ** 2)) + (1 - prior) * float(np.mean(q**2)),
            -prior * float(np.mean(np.log(p))) - (1 - prior) * float(np.mean(np.log1p(-q))),
            p,
            q,
        )
    return results


def _bounds(genuine: int, impostor: int) -> tuple[float, float]:
    """No evidence is stronger than the pairs it was learned from: none of n is a share of about 1/n."""
    return -float(np.log(genuine + 1)), float(np.log(impostor + 1))
