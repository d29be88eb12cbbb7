"""Embeddings of people -> the figures of a calibration."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise

import numpy as np

from mgn_deploy import __version__
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import Calibration, CalibrationData, CameraPair, Pooled, Reliability, Scores
from mgn_deploy.identity.fit import FITS, FOLDS, CrossValidated, Method, cross_validated
from mgn_deploy.identity.pairs import Pairs, genuine_and_impostor, to_means
from mgn_deploy.identity.rates import Interval, Rate, measure, needed_pairs, threshold_at
from mgn_deploy.progress import Progress

FARS = (1e-2, 1e-3, 1e-4)
MIN_PEOPLE = 2 * FOLDS  # two in each fold, whose images make its impostor pairs
MIN_GENUINE = 20
BINS = 10
POOLED = (2, 4, 8)  # images of a person, over whose mean similarity `identify` decides
Bootstrap = Callable[..., tuple[list[Rate], Interval, Interval]]  # `measure` with its draws
_TAIL_STEPS = 20  # rates a decade
_log = logging.getLogger("mgn_deploy")


def calibrate_embeddings(
    embeddings: np.ndarray,
    people: np.ndarray,
    cameras: np.ndarray,
    *,
    bundle_id: str,
    backend: str,
    source: str,
    subsets: Sequence[str] = (),
    images_sha256: str = "",
    prior: float = 0.5,
    same_camera: bool = False,
    max_pairs: int = 2_000_000,
    replicates: int = 300,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """`calibrate`, of embeddings that are there: unit rows `[n, d]` with the person (from 0 on) and camera of each.

    Raises:
        UserError: too few people or pairs, or one camera alone.
    """
    if not same_camera and len(np.unique(cameras)) < 2:
        raise UserError(
            f"all {len(people)} images of {source} are by one camera, and pairs by one camera are easier than those to "
            "come: give images by two cameras, or pass --same-camera and expect too good figures"
        )
    genuine, impostor = genuine_and_impostor(
        embeddings, people, cameras, same_camera=same_camera, max_pairs=max_pairs, seed=seed, progress=progress
    )
    count = len(np.unique(people))
    if not _enough(count, genuine, impostor):
        raise UserError(
            f"{source} has {count} people, {len(genuine)} pairs of one person and {len(impostor)} of two"
            f"{'' if same_camera else ' by two cameras'}: a calibration needs at least {MIN_PEOPLE}, {MIN_GENUINE} and "
            f"{needed_pairs(FARS[0])}"
        )
    validated = cross_validated(genuine, impostor, int(people.max()) + 1, prior, seed)
    best: Method = min(validated, key=lambda name: (validated[name].log_loss, name != "platt"))
    bootstrap = partial(measure, replicates=replicates, seed=seed, progress=progress)
    rates, eer, eer_threshold = bootstrap(genuine, impostor, FARS, count)
    pooled = list(_pooled(embeddings, people, cameras, best, same_camera, max_pairs, seed, bootstrap))
    notes = _notes(subsets, same_camera, len(impostor), impostor.total)
    for rate in (*rates, *(rate for one in pooled for rate in one.rates)):
        if rate.problem:
            notes.append(f"FAR {rate.far:g}: {rate.problem}")
    for note in notes:
        _log.warning(note)
    return Calibration(
        bundle_id=bundle_id,
        backend=backend,
        data=CalibrationData(
            source=source,
            subsets=list(subsets),
            images_sha256=images_sha256,
            images=len(people),
            people=count,
            cameras=len(np.unique(cameras)),
            same_camera=same_camera,
            genuine=len(genuine),
            genuine_total=genuine.total,
            impostor=len(impostor),
            impostor_total=impostor.total,
            seed=seed,
        ),
        prior=prior,
        method=best,
        evidence=FITS[best](genuine.similarities, impostor.similarities),
        cross_validation={name: Scores(brier=one.brier, log_loss=one.log_loss) for name, one in validated.items()},
        reliability=list(_reliability(validated[best], prior)),
        rates=rates,
        eer=eer,
        eer_threshold=eer_threshold,
        tail=_tail(impostor.similarities),
        pooled=pooled,
        camera_pairs=list(_by_cameras(genuine, impostor, bootstrap)),
        notes=notes,
        tools={"mgn-deploy": __version__, "numpy": np.__version__, "python": platform.python_version()},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _enough(people: int, genuine: Pairs, impostor: Pairs) -> bool:
    """Whether so many people and pairs give a threshold."""
    return people >= MIN_PEOPLE and len(genuine) >= MIN_GENUINE and len(impostor) >= needed_pairs(FARS[0])


def _notes(subsets: Sequence[str], same_camera: bool, used: int, total: int) -> list[str]:
    notes = []
    if "train" in subsets:
        notes.append(
            "the calibration uses the training subset: if the model was trained on these people, its thresholds are "
            "too low and its probabilities too sure"
        )
    if same_camera:
        notes.append("pairs by one camera are in it, which are easier than those by two")
    if used < total:
        notes.append(f"{used:,} of {total:,} impostor pairs were drawn at random")
    for far in FARS:
        if used < needed_pairs(far):
            notes.append(
                f"no threshold for a false-accept rate of {far:g}: it needs {needed_pairs(far):,} impostor pairs, and "
                f"there are {used:,}"
            )
    return notes


def _tail(impostor: np.ndarray) -> list[tuple[float, float]]:
    """Thresholds from a rate of one half down to the lowest that the rule of three allows."""
    lowest = 3 / len(impostor)
    steps = int(np.ceil(_TAIL_STEPS * np.log10(0.5 / lowest)))
    grid = {*np.geomspace(0.5, lowest, max(steps, 2)).tolist(), *(far for far in FARS if far >= lowest)}
    rates = sorted(grid, reverse=True)
    return [(rate, threshold_at(impostor, rate)) for rate in rates]


def _pooled(
    embeddings: np.ndarray,
    people: np.ndarray,
    cameras: np.ndarray,
    method: Method,
    same_camera: bool,
    max_pairs: int,
    seed: int,
    bootstrap: Bootstrap,
) -> Iterator[Pooled]:
    """For each number of images that enough people have."""
    for images in POOLED:
        genuine, impostor = to_means(
            embeddings, people, cameras, images, same_camera=same_camera, max_pairs=max_pairs, seed=seed
        )
        count = len(np.unique(impostor.second))
        if _enough(count, genuine, impostor):
            rates, _, _ = bootstrap(genuine, impostor, FARS, count, images=images)
            yield Pooled(
                images=images,
                people=count,
                genuine=len(genuine),
                impostor=len(impostor),
                rates=rates,
                evidence=FITS[method](genuine.similarities, impostor.similarities),
                tail=_tail(impostor.similarities),
            )


def _reliability(held_out: CrossValidated, prior: float) -> Iterator[Reliability]:
    genuine, impostor = held_out.genuine, held_out.impostor
    edges = np.arange(BINS + 1) / BINS
    for low, high in pairwise(edges.tolist()):
        same, other = (kind[(kind >= low) & ((kind < high) | (high == 1))] for kind in (genuine, impostor))
        weight_same, weight_other = prior * len(same) / len(genuine), (1 - prior) * len(other) / len(impostor)
        if not len(same) and not len(other):
            continue
        total = prior * same.sum() / len(genuine) + (1 - prior) * other.sum() / len(impostor)
        yield Reliability(
            low=low,
            high=high,
            mean_probability=float(total / (weight_same + weight_other)),
            genuine_share=float(weight_same / (weight_same + weight_other)),
            pairs=len(same) + len(other),
        )


def _by_cameras(genuine: Pairs, impostor: Pairs, bootstrap: Bootstrap) -> Iterator[CameraPair]:
    """Each pair of cameras whose pairs are enough for a threshold; none where there is only one pair of cameras."""
    together = Counter(map(tuple, impostor.cameras.tolist()))
    for first, second in sorted(together) if len(together) > 1 else ():
        same, other = (pairs.where((pairs.cameras == (first, second)).all(axis=1)) for pairs in (genuine, impostor))
        people = len(np.unique(np.concatenate([other.first, other.second])))
        if _enough(people, same, other):
            rates, eer, _ = bootstrap(same, other, FARS, people)
            yield CameraPair(
                cameras=(first, second),
                people=people,
                genuine=len(same),
                impostor=len(other),
                eer=eer,
                rates=rates,
            )
