"""Thresholds at false-accept rates and the equal error rate, with intervals by a bootstrap over people.

Two pairs that share a person are not independent, so people are drawn with replacement, not pairs: a pair counts as
often as both of its people were drawn (the subset bootstrap of Bolle, Ratha and Pankanti, "Error analysis of pattern
recognition systems", CVIU 2004, for both ends of a pair).
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from mgn_deploy.identity.pairs import Pairs
from mgn_deploy.progress import Progress

INTERVAL = (2.5, 97.5)  # percent: 95% lie between


class Strict(BaseModel):
    """A part of `calibration.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Interval(Strict):
    """A measured value and the ends of its 95% interval over people."""

    value: float
    low: float
    high: float


class Rate(Strict):
    """The threshold at one false-accept rate, and what it does on the calibration's own pairs.

    Attributes:
        far: the rate that was asked for.
        threshold: at or above it two images are called the same person; its interval is of the threshold that other
            people would have given.
        measured_far: impostor pairs at or above the threshold, at most `far`.
        tar: genuine pairs at or above the threshold.
        problem: why the rate is uncertain, or None.
    """

    far: float
    threshold: Interval
    measured_far: Interval
    tar: Interval
    problem: str | None = None


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
    return _equal_error(genuine, np.arange(len(genuine) + 1), np.arange(len(impostor) + 1), _ranks(genuine, impostor))


def measure(
    genuine: Pairs,
    impostor: Pairs,
    fars: tuple[float, ...],
    people: int,
    *,
    images: int = 1,
    replicates: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Rate], Interval, Interval]:
    """Thresholds at those of `fars` that the impostor pairs suffice for, then the equal error rate and its threshold.

    A threshold's own interval is of the threshold that other people would have given; those of its rates are of the
    threshold as it is, on other people.

    Args:
        genuine, impostor: of `genuine_and_impostor` or `to_means`.
        fars: false-accept rates.
        people, images: as of `few_people`.
        replicates: of the bootstrap.
        seed: of its draws.
        progress: called as (step, done, total).
    """
    fars = tuple(far for far in fars if len(impostor) >= needed_pairs(far))
    present = np.flatnonzero(np.bincount(np.concatenate([genuine.first, impostor.first, impostor.second])))
    thresholds = [threshold_at(impostor.similarities, far) for far in fars]
    accepted, kept = (
        [int(np.searchsorted(-pairs.similarities, -one, side="right")) for one in thresholds]
        for pairs in (impostor, genuine)
    )
    ranks = _ranks(genuine.similarities, impostor.similarities)
    generator = np.random.default_rng(seed)
    drawn = []
    for replicate in range(replicates):
        times = np.zeros(present[-1] + 1, np.int64)
        times[present] = generator.multinomial(len(present), np.full(len(present), 1 / len(present)))
        # How many pairs of the draw are among the first 0, 1, 2, ... pairs.
        of_impostor = np.append(0, np.cumsum(times[impostor.first] * times[impostor.second]))
        of_genuine = np.append(0, np.cumsum(times[genuine.first]))
        if of_impostor[-1] == 0 or of_genuine[-1] == 0:
            continue  # of very few people a draw may hold one person alone
        allowed = [np.searchsorted(of_impostor, far * of_impostor[-1] + 1e-9, side="right") - 1 for far in fars]
        drawn.append(
            [
                *(_above(impostor.similarities, int(count)) for count in allowed),
                *(of_impostor[accepted] / of_impostor[-1]),
                *(of_genuine[kept] / of_genuine[-1]),
                *_equal_error(genuine.similarities, of_genuine, of_impostor, ranks),
            ]
        )
        if progress:
            progress("bootstrap", replicate + 1, replicates)
    measured = [
        *thresholds,
        *(count / len(impostor) for count in accepted),
        *(count / len(genuine) for count in kept),
        *equal_error_rate(genuine.similarities, impostor.similarities),
    ]
    ends = np.percentile(drawn, INTERVAL, axis=0).T.tolist()
    *found, eer, eer_threshold = (
        Interval(value=value, low=low, high=high) for value, (low, high) in zip(measured, ends, strict=True)
    )
    n = len(fars)
    rates = [
        Rate(far=far, threshold=threshold, measured_far=share, tar=tar, problem=few_people(people, far, images))
        for far, threshold, share, tar in zip(fars, found[:n], found[n : 2 * n], found[2 * n :], strict=True)
    ]
    return rates, eer, eer_threshold


def _above(impostor: np.ndarray, count: int) -> float:
    """The lowest threshold that accepts at most the first `count` of descending similarities."""
    if count >= len(impostor):
        return float(impostor[-1])
    return float(np.nextafter(np.float32(impostor[count]), np.float32(np.inf)))


def _ranks(genuine: np.ndarray, impostor: np.ndarray) -> np.ndarray:
    """How many impostors each genuine similarity, taken as threshold, accepts."""
    return np.searchsorted(-impostor, -genuine, side="right")


def _equal_error(
    genuine: np.ndarray, of_genuine: np.ndarray, of_impostor: np.ndarray, ranks: np.ndarray
) -> tuple[float, float]:
    # At the threshold genuine[i] all genuine pairs up to i are accepted.
    rejected = 1 - of_genuine[1:] / of_genuine[-1]
    accepted = of_impostor[ranks] / of_impostor[-1]
    at = int(np.argmin(np.abs(rejected - accepted)))
    return float(rejected[at] + accepted[at]) / 2, float(genuine[at])
