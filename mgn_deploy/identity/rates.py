"""Thresholds at false-accept rates and the equal error rate, with intervals by a bootstrap over people.

Two pairs that share a person are not independent, so people are drawn with replacement, not pairs: a pair counts as
often as both of its people were drawn (the subset bootstrap of Bolle, Ratha and Pankanti, "Error analysis of pattern
recognition systems", CVIU 2004, for both ends of a pair).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mgn_deploy.identity.pairs import Pairs
from mgn_deploy.progress import Progress

INTERVAL = (2.5, 97.5)  # percent: 95% lie between


@dataclass(frozen=True)
class Measured:
    """A threshold's rates as measured on pairs, each with the ends of its 95% interval: (value, low, high)."""

    threshold: tuple[float, float, float]
    far: tuple[float, float, float]
    tar: tuple[float, float, float]


def needed_pairs(far: float) -> int:
    """Impostor pairs below which a false-accept rate cannot be told from a lower one.

    By the rule of three (Hanley and Lippman-Hand, JAMA 1983): none in n trials leaves a rate of up to 3/n with 95%
    confidence.
    """
    return int(np.ceil(round(3 / far, 6)))


def needed_people(far: float) -> int:
    """People who make as many pairs of people as the rule of three asks of pairs: images of the same two people do
    not count twice."""
    return int(np.ceil((1 + np.sqrt(1 + 8 * needed_pairs(far))) / 2))


def few_people(people: int, far: float, images: int = 1) -> str | None:
    """What to say of a threshold where its people are fewer than `needed_people`; None where they are enough.

    Args:
        people: whose pairs the threshold was learned of.
        far: its false-accept rate.
        images: over how many of a person its similarities are means.
    """
    if people >= needed_people(far):
        return None
    means = f", for means over {images} images," if images > 1 else ""
    return (
        f"{people} people{means} are few for so low a rate, {needed_people(far)} would be enough: the threshold may "
        "let more through"
    )


def threshold_at(impostor: np.ndarray, far: float) -> float:
    """The lowest threshold at or above which at most the share `far` of the impostors' similarities lies.

    Args:
        impostor: similarities `[n]`, descending.
        far: from 0 to 1.
    """
    return _above(impostor, int(np.floor(far * len(impostor) + 1e-9)))


def equal_error_rate(genuine: np.ndarray, impostor: np.ndarray) -> tuple[float, float]:
    """The rate at which as many genuine pairs are rejected as impostor pairs are accepted, and its threshold.

    Args:
        genuine, impostor: similarities, descending.
    """
    return _equal_error(
        genuine, impostor, np.arange(1, len(genuine) + 1), np.arange(1, len(impostor) + 1), _ranks(genuine, impostor)
    )


def measure(
    genuine: Pairs,
    impostor: Pairs,
    fars: tuple[float, ...],
    *,
    replicates: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Measured], tuple[float, float, float], tuple[float, float, float]]:
    """Thresholds at each of `fars`, then the equal error rate and its threshold, with 95% intervals.

    A threshold's own interval is of the threshold that other people would have given; those of its rates are of the
    threshold as it is, on other people.
    """
    people = 1 + int(max(genuine.first.max(), impostor.first.max(), impostor.second.max()))
    present = np.zeros(people, bool)
    for numbers in (genuine.first, impostor.first, impostor.second):
        present[numbers] = True
    present_people = np.flatnonzero(present)
    thresholds = np.array([threshold_at(impostor.similarities, far) for far in fars])
    accepted = [int(np.searchsorted(-impostor.similarities, -one, side="right")) for one in thresholds]
    kept = [int(np.searchsorted(-genuine.similarities, -one, side="right")) for one in thresholds]
    ranks = _ranks(genuine.similarities, impostor.similarities)
    generator = np.random.default_rng(seed)
    drawn_thresholds, drawn_fars, drawn_tars, drawn_eers = [], [], [], []
    for replicate in range(replicates):
        times = np.zeros(people, np.int64)
        times[present_people] = generator.multinomial(
            len(present_people), np.full(len(present_people), 1 / len(present_people))
        )
        of_impostor = np.cumsum(times[impostor.first] * times[impostor.second])
        of_genuine = np.cumsum(times[genuine.first])
        if of_impostor[-1] == 0 or of_genuine[-1] == 0:
            continue  # of very few people a draw may hold one person alone
        allowed = [int(np.searchsorted(of_impostor, far * of_impostor[-1] + 1e-9, side="right")) for far in fars]
        drawn_thresholds.append([_above(impostor.similarities, count) for count in allowed])
        drawn_fars.append([_upto(of_impostor, count) / of_impostor[-1] for count in accepted])
        drawn_tars.append([_upto(of_genuine, count) / of_genuine[-1] for count in kept])
        drawn_eers.append(_equal_error(genuine.similarities, impostor.similarities, of_genuine, of_impostor, ranks))
        if progress:
            progress("bootstrap", replicate + 1, replicates)
    rates = [
        Measured(
            _with_interval(float(threshold), np.array(drawn_thresholds)[:, index]),
            _with_interval(count / len(impostor), np.array(drawn_fars)[:, index]),
            _with_interval(kept[index] / len(genuine), np.array(drawn_tars)[:, index]),
        )
        for index, (threshold, count) in enumerate(zip(thresholds, accepted, strict=True))
    ]
    rate, threshold = equal_error_rate(genuine.similarities, impostor.similarities)
    eers = np.array(drawn_eers)
    return rates, _with_interval(rate, eers[:, 0]), _with_interval(threshold, eers[:, 1])


def _above(impostor: np.ndarray, count: int) -> float:
    """The lowest threshold that accepts at most the first `count` of descending similarities."""
    if count >= len(impostor):
        return float(impostor[-1])
    return float(np.nextafter(np.float32(impostor[count]), np.float32(np.inf)))


def _upto(cumulated: np.ndarray, count: int) -> int:
    return int(cumulated[count - 1]) if count else 0


def _ranks(genuine: np.ndarray, impostor: np.ndarray) -> np.ndarray:
    """How many impostors each genuine similarity, taken as threshold, accepts."""
    return np.searchsorted(-impostor, -genuine, side="right")


def _equal_error(
    genuine: np.ndarray, impostor: np.ndarray, of_genuine: np.ndarray, of_impostor: np.ndarray, ranks: np.ndarray
) -> tuple[float, float]:
    # At the threshold genuine[i] all genuine pairs up to i are accepted.
    rejected = 1 - of_genuine / of_genuine[-1]
    accepted = np.concatenate([[0], of_impostor])[ranks] / of_impostor[-1]
    at = int(np.argmin(np.abs(rejected - accepted)))
    return float(rejected[at] + accepted[at]) / 2, float(genuine[at])


def _with_interval(value: float, drawn: np.ndarray) -> tuple[float, float, float]:
    low, high = np.percentile(drawn, INTERVAL)
    return value, float(low), float(high)
