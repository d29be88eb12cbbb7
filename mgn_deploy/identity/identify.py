"""Who of the enrolled people is it, or nobody of them (open-set identification)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import DEFAULT_FAR, Calibration, Decision, check_far, check_prior, check_same_id
from mgn_deploy.identity.people import Enrolled

CANDIDATES = 3
PRIOR_KNOWN = 0.5
TIE = 1e-6  # of cosine: two people who are so alike to a query are not told apart by it


@dataclass(frozen=True)
class Candidate:
    """An enrolled person with the similarity to a query, and the probability that it is this person.

    `pairs` of images were compared, whose mean the similarity is.
    """

    name: str
    similarity: float
    probability: float | None
    pairs: int


@dataclass(frozen=True)
class Identification:
    """Who one query, or several together, shows.

    Attributes:
        queries: the names of its images.
        name: of the person; None for unknown, and where there is no calibration to tell by.
        probability: that it is this person; for unknown that it is nobody of the list; None without a calibration.
        known: whether the best similarity reaches the threshold; None without a calibration.
        threshold: of a comparison with the first candidate.
        far: the rate at which a person who is not enrolled is named all the same, for this list of people.
        candidates: those who are most above their thresholds, best first; without a calibration the most similar.
        calibrated_for: of how many images of a person the threshold was learned: no more than were compared, on the
            side that has more.
        note: what a reader must know, or None.
    """

    queries: tuple[str, ...]
    name: str | None
    probability: float | None
    known: bool | None
    threshold: float | None
    far: float | None
    candidates: tuple[Candidate, ...]
    calibrated_for: int | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **vars(self),
            "queries": list(self.queries),
            "candidates": [vars(candidate) for candidate in self.candidates],
        }


def far_of_a_comparison(far: float, people: int) -> float:
    """The false-accept rate of one comparison at which a list of `people` names a stranger at the rate `far`.

    A stranger is compared with everybody: 1 - far = (1 - f)^people, were the comparisons independent. (They are not,
    quite, which makes the rate of the whole list lower than `far`.)
    """
    return float(-np.expm1(np.log1p(-far) / people))


def decide_for_list(calibration: Calibration, far: float, people: int, images: int = 1) -> Decision:
    """The threshold at which a list of `people` names a stranger at the rate `far`, which is the decision's `far`.

    It is for the mean similarity to `images` images of a person.

    Where the calibration has too few pairs for that, it is the strictest threshold that it has, the decision's `far` is
    the list's rate there, and `problem` says so.
    """
    one = calibration.decide(far_of_a_comparison(check_far(far), people), images)
    of_list = float(-np.expm1(people * np.log1p(-one.far)))
    if one.problem is None or of_list <= far * (1 + 1e-6):
        return one._replace(far=far)
    return Decision(
        of_list,
        one.threshold,
        f"for a list of {people} people {one.problem}, which names a stranger at a rate of {of_list:.3g}, not "
        f"{far:.3g}",
    )


def similarities_to_people(queries: np.ndarray, enrolled: Enrolled) -> np.ndarray:
    """A similarity of each query to each person, float32 `[queries, people]`: the mean over the person's images.

    The mean of cosines is on the scale of one cosine and less noisy, so that a threshold for fewer images holds.
    """
    sums = np.add.reduceat(queries.astype(np.float32) @ enrolled.rows.T, enrolled.starts, axis=1)
    return np.clip(sums / np.array([len(person.embeddings) for person in enrolled.people], np.float32), -1, 1)


def identify(
    queries: np.ndarray,
    enrolled: Enrolled,
    calibration: Calibration | None,
    *,
    names: Sequence[str] | None = None,
    far: float = DEFAULT_FAR,
    together: bool = False,
    prior: float = PRIOR_KNOWN,
    candidates: int = CANDIDATES,
) -> list[Identification]:
    """Name the enrolled person of each query, or call it unknown.

    Args:
        queries: unit rows `[n, d]` of the bundle that embedded the people.
        enrolled: of `People.load`.
        calibration: of that bundle; without one there are similarities alone.
        names: of the queries' images; None: their numbers.
        far: the rate at which somebody who is not enrolled may be named.
        together: all queries show one person: their similarities are averaged.
        prior: the chance that a query shows anybody enrolled, each of them alike.
        candidates: how many people each answer lists.

    Returns:
        One answer a query; with `together` one.

    Raises:
        UserError: nobody is enrolled, embeddings that do not fit or are not finite, another bundle's calibration, or a
            rate or prior that is none.
    """
    check_far(far)
    check_prior(prior)
    if not enrolled.people:
        raise UserError("nobody is enrolled: `mgn-deploy enrol NAME IMAGES --people PEOPLE --bundle BUNDLE` enrols")
    if queries.ndim != 2 or not len(queries) or queries.shape[1] != enrolled.rows.shape[1]:
        raise UserError(f"queries of shape {list(queries.shape)} do not fit embeddings of {enrolled.rows.shape[1]}")
    if not np.isfinite(queries).all():
        raise UserError("a query's embedding is not finite: embed the image again")
    if calibration is not None:
        check_same_id("the calibration", calibration.bundle_id, enrolled.bundle_id)
    labels = tuple(map(str, range(len(queries)))) if names is None else tuple(names)
    groups = [labels] if together else [(label,) for label in labels]
    similarities = similarities_to_people(queries, enrolled)
    if together:
        similarities = similarities.mean(axis=0, keepdims=True)
    own = np.array([len(person.embeddings) for person in enrolled.people])
    # A mean over q x n pairs varies less than one over the larger of the two.
    images = np.maximum(own, len(groups[0]))
    margins, decisions = similarities, dict[int, Decision]()
    if calibration is not None:
        decisions = {one: decide_for_list(calibration, far, len(own), one) for one in np.unique(images).tolist()}
        margins = similarities - np.array([decisions[one].threshold for one in images.tolist()])

    def answer(group: tuple[str, ...], row: np.ndarray, margin: np.ndarray) -> Identification:
        """By how far each person is above the threshold for so many images; without a calibration by similarity."""
        order = np.argsort(-margin, kind="stable").tolist()
        chances: Sequence[float | None] = [None] * len(row)
        if calibration is not None:
            probabilities, nobody = posteriors(row, calibration, prior, images)
            chances = probabilities.tolist()
        listed = tuple(
            Candidate(enrolled.people[one].name, float(row[one]), chances[one], len(group) * int(own[one]))
            for one in order[:candidates]
        )
        best, notes = order[0], list[str]()
        tied = [repr(enrolled.people[one].name) for one in order[1:] if margin[best] - margin[one] < TIE]
        if tied and margin[best] >= 0:
            notes.append(f"{', '.join(tied)} {'are' if len(tied) > 1 else 'is'} as near as {listed[0].name!r}")
        if calibration is None:
            notes.append("no name without a calibration")
            return Identification(group, None, None, None, None, None, listed, note="; ".join(notes))
        decision = decisions[int(images[best])]
        notes += [decision.problem] if decision.problem else []
        known = bool(margin[best] >= 0)
        return Identification(
            group,
            listed[0].name if known else None,
            chances[best] if known else nobody,
            known,
            decision.threshold,
            decision.far,
            listed,
            decision.images,
            "; ".join(notes) or None,
        )

    return list(map(answer, groups, similarities, margins))


def posteriors(
    similarities: np.ndarray, calibration: Calibration, prior: float, images: np.ndarray | int = 1
) -> tuple[np.ndarray, float]:
    """P(it is this person) of each person `[people]`, and P(nobody of them).

    By Bayes' rule, the enrolled sharing `prior` evenly and "nobody" having the rest: one of them, or nobody, it must
    be, so the probabilities sum to 1, and the same similarity says less the longer the list is.
    """
    logs = calibration.log_likelihood_ratio(similarities, images) + np.log(prior / len(similarities))
    everything = np.append(logs, np.log1p(-prior))
    shares = np.exp(everything - everything.max())
    shares /= shares.sum()
    return shares[:-1], float(shares[-1])
