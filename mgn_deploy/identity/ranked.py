"""Rank lists with probabilities, and with the line below which results are not the query's person."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.calibration import DEFAULT_FAR, Calibration, check_far, check_same_id
from mgn_deploy.retrieval.rank_list import RankList

_BINS = 4096  # of similarities
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Judged:
    """What rank lists were judged by.

    Attributes:
        far: the share of pairs of two people whose similarity reaches `threshold`.
        threshold: of a cosine similarity.
        prior: the share of pairs of one person that probabilities assume.
        problem: what a reader must know, or None.
    """

    far: float
    threshold: float
    prior: float
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def judge(
    lists: Sequence[RankList], calibration: Calibration, *, far: float = DEFAULT_FAR, prior: float | None = None
) -> tuple[list[RankList], Judged]:
    """Give every result the probability that it shows the query's person, and say whether it reaches the threshold.

    Each pair is judged alone: of a gallery of g images of other people about far x g reach the threshold.

    Args:
        lists: of `search`, whose similarities are those of two images: not of expanded queries.
        calibration: of the bundle that embedded both sides.
        far: a false-accept rate of a pair.
        prior: the share of pairs of one person; None: the calibration's.

    Raises:
        UserError: a rate or prior that is none.
    """
    decision = calibration.decide(far)
    calibration.probability(0.0, prior)  # refuses what is no prior before anything is made

    def judged(ranked: RankList) -> RankList:
        known = np.array([np.nan if one.similarity is None else one.similarity for one in ranked.results])
        chances = calibration.probability(known, prior)
        results = [
            one
            if one.similarity is None
            else replace(one, probability=float(chance), same=one.similarity >= decision.threshold)
            for one, chance in zip(ranked.results, chances, strict=True)
        ]
        return replace(ranked, results=results)

    used = calibration.prior if prior is None else prior
    return [judged(ranked) for ranked in lists], Judged(decision.far, decision.threshold, used, decision.problem)


def estimate_prior(
    embeddings: np.ndarray | Store, calibration: Calibration, *, images: int = 1500, seed: int = 0
) -> float:
    """Estimate the share of pairs of one person among all pairs of a gallery, without labels.

    By expectation maximisation: the share is the mean of the probabilities that it gives rise to (Saerens, Latinne and
    Decaestecker, "Adjusting the outputs of a classifier to new a priori probabilities", Neural Computation 2002).

    Args:
        embeddings: unit rows `[n, d]`, or the store that holds them, of which no others than those drawn are read.
        calibration: of the bundle that made them.
        images: most rows that are compared with each other, drawn at random.
        seed: of the draw.

    Returns:
        At least 1/n and at most one half.
    """
    n = len(embeddings)
    drawn = np.arange(n) if n <= images else np.sort(np.random.default_rng(seed).choice(n, images, replace=False))
    rows = np.asarray(embeddings.take(drawn) if isinstance(embeddings, Store) else embeddings[drawn], np.float32)
    similarities = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    if not len(similarities):
        return 0.5
    counts, edges = np.histogram(similarities, _BINS)
    ratios = np.exp(calibration.log_likelihood_ratio((edges[:-1] + edges[1:]) / 2))
    share = 0.5
    for _ in range(1000):
        before, share = share, float(counts @ (share * ratios / (share * ratios + 1 - share)) / counts.sum())
        if abs(share - before) < 1e-9:
            break
    return min(max(share, 1 / n), 0.5)


def judge_by_bundle(
    lists: list[RankList],
    bundle: str | os.PathLike[str] | None,
    gallery: Store,
    *,
    far: float = DEFAULT_FAR,
    prior: float | None = None,
    expanded: bool = False,
) -> tuple[list[RankList], Judged | None]:
    """`judge` by a bundle's calibration; without a bundle or a calibration the lists as they are, and None.

    Few pairs of a gallery are of one person, so without a `prior` their share is estimated (`estimate_prior`): with the
    calibration's, the best of many strangers would seem certain.

    Args:
        lists: of `search`.
        bundle: the folder of the bundle that embedded the gallery.
        gallery: the store that was searched.
        far: as of `judge`.
        prior: the share of pairs of one person; None: estimated from the gallery.
        expanded: the queries were, so that no similarity is one of two images: nothing is judged, which is told.

    Raises:
        UserError: another bundle's gallery, a broken calibration, or a rate or prior that is none.
    """
    check_far(far)
    if bundle is None:
        return lists, None
    opened = Bundle.open(bundle)
    check_same_id(str(gallery.folder), gallery.manifest.bundle_id, opened.id)
    calibration = Calibration.find(opened)
    if calibration is None:
        return lists, None
    if expanded:
        _log.warning("no probabilities: a calibration is of pairs of images, and the queries were expanded")
        return lists, None
    how = "given" if prior is not None else "estimated from the gallery"
    if prior is None:
        prior = estimate_prior(gallery, calibration)
    judged, by = judge(lists, calibration, far=far, prior=prior)
    _log.info(
        f"probabilities where {100 * by.prior:.2g}% of pairs are one person ({how}); threshold {by.threshold:.4f} at "
        f"FAR {by.far:g}"
    )
    if by.problem:
        _log.warning(by.problem)
    return judged, by
