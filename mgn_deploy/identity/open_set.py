"""Open-set identification on labelled images: how often enrolled people are found, and strangers taken for them.

Definitions, as in NIST's FRVT 1:N reports (Grother, Ngan and Hanaoka, NISTIR 8271, 2019, section 3) and ISO/IEC
19795-1: a search is *mated* if the person is enrolled, else *non-mated*.

- FPIR(T), false positive identification rate: the share of non-mated searches whose best similarity reaches T.
- DIR(T), detection and identification rate at rank 1: the share of mated searches whose best similarity is that of the
  right person and reaches T; 1 - FNIR(T) of those reports (Phillips, Grother and Micheals, "Evaluation Methods in Face
  Recognition", Handbook of Face Recognition, 2011: "DIR at FAR").

Data sets for ranking have everybody enrolled, so half of the people are drawn to be enrolled and the others are
strangers, many times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import Calibration
from mgn_deploy.identity.identify import decide_for_list
from mgn_deploy.identity.rates import INTERVAL, needed_pairs, threshold_at
from mgn_deploy.progress import Progress

FPIRS = (1e-2, 1e-1)
HALVES = 100
MIN_PEOPLE = 4
_ROWS = 512  # queries whose similarities to the gallery are in memory at a time

Spread = tuple[float, float, float]


@dataclass(frozen=True)
class OperatingPoint:
    """One threshold. Rates are (median, low, high) over the draws, low and high holding 95% of them.

    Attributes:
        name: what the threshold is of, as in "FPIR 0.01" or "calibration, FAR 0.001".
        threshold: itself drawn anew with the people, or the calibration's, by how many images people have.
        fpir, dir: fractions.
        problem: why it is uncertain, or None.
    """

    name: str
    threshold: Spread
    fpir: Spread
    dir: Spread
    problem: str | None


@dataclass(frozen=True)
class OpenSet:
    """Open-set figures.

    Attributes:
        people: in the gallery; half of them are enrolled in each draw.
        enrolled: how many that is.
        mated, non_mated: searches a draw, on average.
        draws: of halves.
        points: one for each rate, then one for each of the calibration's.
    """

    people: int
    enrolled: int
    mated: float
    non_mated: float
    draws: int
    points: list[OperatingPoint]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure_open_set(
    query: np.ndarray,
    gallery: np.ndarray,
    query_ids: Sequence[int] | np.ndarray,
    query_cameras: Sequence[int] | np.ndarray,
    gallery_ids: Sequence[int] | np.ndarray,
    gallery_cameras: Sequence[int] | np.ndarray,
    *,
    calibration: Calibration | None = None,
    fpirs: Sequence[float] = FPIRS,
    fars: Sequence[float] = (1e-2, 1e-3),
    draws: int = HALVES,
    seed: int = 0,
    progress: Progress | None = None,
) -> OpenSet:
    """Enrol half of the gallery's people, search for all queries, and count; then another half.

    A person's similarity is `similarities_to_people`'s. Images by the query's own camera are left out, as in ranking;
    where all cameras are one number, none are.

    Args:
        query, gallery: unit rows `[q, d]` and `[g, d]`.
        query_ids, gallery_ids: int, the people; images of nobody must not be among them.
        query_cameras, gallery_cameras: int.
        calibration: its thresholds for `fars` are tried, too.
        fpirs: at which DIR is measured.
        fars: of the calibration: the rates at which a whole list may name a stranger.
        draws: how many halves.
        seed: of the draws.
        progress: called with the queries done and to do.

    Raises:
        UserError: fewer than four people in the gallery, or no query of one of them.
    """
    people, owners = np.unique(np.asarray(gallery_ids), return_inverse=True)
    if len(people) < MIN_PEOPLE:
        raise UserError(f"open-set figures need at least {MIN_PEOPLE} people in the gallery, not {len(people)}")
    similarities, images = _to_people(
        query, gallery, owners, np.asarray(query_cameras), np.asarray(gallery_cameras), len(people), progress
    )
    query_ids = np.asarray(query_ids)
    found = np.minimum(np.searchsorted(people, query_ids), len(people) - 1)
    own = np.where(people[found] == query_ids, found, -1)  # -1: nobody of the gallery
    # Somebody without an image by another camera is not searched for.
    searched = (own < 0) | ~np.isinf(similarities[np.arange(len(query)), own])
    if not (searched & (own >= 0)).any():
        raise UserError("no query shows anybody of the gallery by another camera")
    enrolled = len(people) // 2
    names = [f"FPIR {rate:g}" for rate in fpirs]
    # For each rate of the calibration: each similarity's threshold by the number of images, and why it is uncertain.
    decided: list[tuple[np.ndarray, str | None]] = []
    if calibration is not None:
        names += [f"calibration, FAR {far:g}" for far in fars]
        for far in fars:
            decisions = [decide_for_list(calibration, far, enrolled, 1 + one) for one in range(images.max())]
            used = [decisions[one - 1].problem for one in np.unique(images[images > 0]).tolist()]
            thresholds = np.array([one.threshold for one in decisions])
            decided.append((thresholds[np.maximum(images, 1) - 1], next(filter(None, used), None)))

    generator = np.random.default_rng(seed)
    drawn, searches = [], []
    for _ in range(draws):
        half = np.sort(generator.permutation(len(people))[:enrolled])
        is_enrolled = np.zeros(len(people) + 1, bool)  # the last one is nobody's
        is_enrolled[half] = True
        mated, non_mated = searched & is_enrolled[own], searched & ~is_enrolled[own]
        if not mated.any() or not non_mated.any():
            continue
        mine = similarities[:, half]
        strangers = np.sort(mine[non_mated].max(axis=1))[::-1]
        cuts = [(threshold_at(strangers, rate), mine) for rate in fpirs]
        cuts += [(0.0, mine - thresholds[:, half]) for thresholds, _ in decided]
        rates = []
        for cut, scores in cuts:
            reached, first = scores.max(axis=1) >= cut, half[scores.argmax(axis=1)]
            rates.append((cut, np.mean(reached[non_mated]), np.mean((reached & (first == own))[mated])))
        drawn.append(rates)
        searches.append((mated.sum(), non_mated.sum()))
    if not drawn:
        raise UserError("no draw of people had both a person who is enrolled and one who is not among the queries")
    mated_searches, stranger_searches = np.mean(searches, axis=0).tolist()
    by_point = np.transpose(drawn, (1, 2, 0))  # cuts, FPIR and DIR of each draw
    cuts_of = [*by_point[: len(fpirs), 0], *(thresholds[images > 0] for thresholds, _ in decided)]
    problems = [
        f"a false positive identification rate of {rate:g} needs {needed_pairs(rate):,} searches by strangers, and "
        f"there are {stranger_searches:.0f}"
        if stranger_searches < needed_pairs(rate)
        else None
        for rate in fpirs
    ] + [problem for _, problem in decided]
    points = [
        OperatingPoint(name, _spread(cut), _spread(fpir), _spread(dir_), problem)
        for name, cut, (_, fpir, dir_), problem in zip(names, cuts_of, by_point, problems, strict=True)
    ]
    return OpenSet(len(people), enrolled, mated_searches, stranger_searches, len(drawn), points)


def open_set_of(
    data: Dataset,
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> OpenSet:
    """`measure_open_set` of a data set's queries and gallery; junk and distractors are left out.

    Args:
        data: its query and gallery subsets.
        query, gallery: their embeddings, unit rows in their order.
        calibration: of the bundle that made them.
        seed: of the draws.
        progress: called with the queries done and to do.

    Raises:
        UserError: what `measure_open_set` refuses.
    """

    def labels(images: Sequence[LabelledImage]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        people = np.array([data.is_person(image.identity) for image in images], bool)
        identities, cameras = (np.array([getattr(image, of) for image in images]) for of in ("identity", "camera"))
        return people, identities[people], cameras[people] if data.has_cameras else np.zeros(people.sum(), np.int64)

    mine, query_ids, query_cameras = labels(data.query)
    theirs, gallery_ids, gallery_cameras = labels(data.gallery)
    return measure_open_set(
        query[mine],
        gallery[theirs],
        query_ids,
        query_cameras,
        gallery_ids,
        gallery_cameras,
        calibration=calibration,
        seed=seed,
        progress=progress,
    )


def _to_people(
    query: np.ndarray,
    gallery: np.ndarray,
    owners: np.ndarray,
    query_cameras: np.ndarray,
    gallery_cameras: np.ndarray,
    people: int,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The mean similarity of each query to each person's images by other cameras, `[queries, people]`, -inf where there
    are none, and how many they are."""
    cameras = np.union1d(query_cameras, gallery_cameras)
    one_camera = len(cameras) == 1
    order = np.argsort(owners, kind="stable")
    owners, rows, gallery_cameras = owners[order], gallery[order].astype(np.float32), gallery_cameras[order]
    result, images = np.full((len(query), people), -np.inf, np.float32), np.zeros((len(query), people), np.int32)
    done = 0
    for camera in cameras:
        kept = np.ones(len(rows), bool) if one_camera else gallery_cameras != camera
        who, starts, counts = np.unique(owners[kept], return_index=True, return_counts=True)
        mine = np.flatnonzero(query_cameras == camera)
        if not len(who) or not len(mine):
            continue
        others = rows[kept]
        for start in range(0, len(mine), _ROWS):
            part = mine[start : start + _ROWS]
            similarities = query[part].astype(np.float32) @ others.T
            images[part[:, None], who] = counts
            result[part[:, None], who] = np.add.reduceat(similarities, starts, axis=1) / counts.astype(np.float32)
            done += len(part)
            if progress:
                progress("searching", done, len(query))
    return result, images


def _spread(values: np.ndarray) -> Spread:
    low, middle, high = np.percentile(values, (INTERVAL[0], 50, INTERVAL[1]))
    return float(middle), float(low), float(high)
