"""Labelled images -> a bundle's calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.datasets.dataset import SUBSETS, Subset
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.files import sha256_file
from mgn_deploy.identity.calibrate_embeddings import calibrate_embeddings
from mgn_deploy.identity.calibration import Calibration, check_prior
from mgn_deploy.progress import Progress


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


def checked_subsets(names: Sequence[str]) -> list[Subset]:
    """Subsets by their names, in the order of `SUBSETS`.

    Raises:
        UserError: a name that none has.
    """
    for name in names:
        if name not in SUBSETS:
            raise UserError(f"no subset {name!r}: there are {', '.join(SUBSETS)}")
    return [subset for subset in SUBSETS if subset in names]


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
