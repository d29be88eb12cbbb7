"""Labelled images -> a bundle's calibration."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise

import numpy as np

from mgn_deploy import __version__
from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.datasets.dataset import SUBSETS, Subset
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.files import sha256_file
from mgn_deploy.identity.calibration import (
    Calibration,
    CalibrationData,
    CameraPair,
    Pooled,
    Reliability,
    Scores,
    check_prior,
)
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


def calibrate(
    data: Dataset,
    embedder: Embedder,
    subsets: Collection[Subset] = ("query", "gallery"),
    *,
    prior: float = 0.5,
    same_camera: bool = False,
    max_pairs: int = 2_000_000,
    replicates: int = 300,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Calibration:
    """Learn what the similarities of a bundle's embeddings say, from images of people that the model has not seen.

    Similarities of people that it was trained on are higher than those of others, so a calibration on them is too
    sure.

    Args:
        data: its images of `subsets`; distractors and junk are left out.
        embedder: opened from the bundle that the calibration is for.
        subsets: of query, gallery, train and multi-query.
        prior: the share of genuine pairs that probabilities assume.
        same_camera: also use pairs by one camera, which are easier.
        max_pairs: most pairs of each kind; more are drawn from.
        replicates: of the bootstrap over people.
        seed: of all draws.
        batch_size: images an engine call.
        progress: called as (step, done, total).

    Raises:
        UserError: an image cannot be read, too few people or pairs, or one camera alone.
    """
    check_prior(prior)
    if not data.has_cameras and not same_camera:
        raise UserError(
            f"{data.root} does not say which camera took which image, and pairs by one camera are easier than those to "
            "come: give images by known cameras, or pass --same-camera and expect too good figures"
        )
    if replicates < 2:
        raise UserError(f"intervals need at least 2 draws of people, not {replicates}")
    images, people = _people_of(data, subsets)
    embeddings = embedder.embed([image.path for image in images], batch_size=batch_size, progress=progress)
    return calibrate_embeddings(
        embeddings,
        people,
        np.array([image.camera for image in images]),
        bundle_id=embedder.bundle.id,
        backend=embedder.backend.name,
        source=f"{data.name}:{data.root}".encode("utf-8", "backslashreplace").decode(),
        subsets=[subset for subset in SUBSETS if subset in subsets],
        images_sha256=_hash_of(data, images),
        prior=prior,
        same_camera=same_camera,
        max_pairs=max_pairs,
        replicates=replicates,
        seed=seed,
        progress=progress,
    )


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


def checked_subsets(names: Sequence[str]) -> list[Subset]:
    """Subsets by their names, in the order of `SUBSETS`.

    Raises:
        UserError: a name that none has.
    """
    for name in names:
        if name not in SUBSETS:
            raise UserError(f"no subset {name!r}: there are {', '.join(SUBSETS)}")
    return [subset for subset in SUBSETS if subset in names]


def _enough(people: int, genuine: Pairs, impostor: Pairs) -> bool:
    """Whether so many people and pairs give a threshold."""
    return people >= MIN_PEOPLE and len(genuine) >= MIN_GENUINE and len(impostor) >= needed_pairs(FARS[0])


def _people_of(data: Dataset, subsets: Collection[Subset]) -> tuple[list[LabelledImage], np.ndarray]:
    """The images of people, and each one's person from 0 on: those of `train` are others than those of the rest."""
    images, keys = [], []
    for subset in (one for one in SUBSETS if one in subsets):
        for image in data.images(subset):
            if data.is_person(image.identity):
                images.append(image)
                keys.append((subset == "train", image.identity))
    if not images:
        raise UserError(f"{data.root} has no image of a person in {', '.join(subsets)}")
    numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
    return images, np.array([numbers[key] for key in keys])


def _hash_of(data: Dataset, images: Sequence[LabelledImage]) -> str:
    """SHA-256 of the images' names below the data's folder and of their content."""
    digest = hashlib.sha256()
    for name, path in sorted((image.path.as_posix(), image.path) for image in images):
        below = name.removeprefix(data.root.as_posix()).lstrip("/")
        digest.update(below.encode("utf-8", "surrogateescape") + b"\0" + bytes.fromhex(sha256_file(path)))
    return digest.hexdigest()


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
