"""A folder a person, whatever the files are called.

DIR/anna/IMG_0001.jpg                               cameras unknown: every other image of Anna is a right answer
DIR/anna/cam_2/IMG_0001.jpg, DIR/anna/cam2_0001.jpg cameras known, where every image has one

Queries are the first image of each person, or, with cameras, of each person by each camera, in the order of the names'
bytes; the gallery is all others. People with a single image are in the gallery only.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mgn_deploy.datasets.dataset import NO_CAMERA, Dataset, LabelledImage, Subset
from mgn_deploy.datasets.labels import read_labels
from mgn_deploy.errors import UserError
from mgn_deploy.images.formats import skipped_sentence
from mgn_deploy.images.listing import list_images

_log = logging.getLogger("mgn_deploy")

_CAMERA = re.compile(r"cam(?:era)?[ _-]?(\d{1,4})(?!\d)", re.IGNORECASE)


def open_identities(root: str | os.PathLike[str], subsets: Collection[Subset]) -> Dataset:
    """List a folder of people's folders, who are numbered 1, 2, ... by the bytes of their folders' names.

    With `train` among the subsets everybody is trained on, and query and gallery are empty.

    Raises:
        UserError: no such folder, no image in it, or fewer than two people's; no person has two images to tell apart.
    """
    root = Path(root)
    files = list_images(root)
    labels = read_labels("folder", [file.name for file in files])
    notes = []
    loose = [file.name for file in files if labels(file.name) is None]
    if loose:
        notes.append(f"{len(loose):,} images beside the people's folders were left out, {loose[0]!r} the first")
    rows = [(file, labels(file.name), _camera(file.name)) for file in files]
    images = [
        LabelledImage(root / file.name, label.identity, NO_CAMERA if camera is None else camera)
        for file, label, camera in rows
        if label is not None
    ]
    if len(labels.people) < 2:
        raise UserError(
            f"{root} holds the folders of {len(labels.people)} people with images, and needs two: DIR/anna/1.jpg"
        )
    without = sum(image.camera == NO_CAMERA for image in images)
    if 0 < without < len(images):
        notes.append(f"{without:,} of {len(images):,} images name no camera (cam_1), so that cameras are not used")
    if without:
        images = [LabelledImage(image.path, image.identity, NO_CAMERA) for image in images]
    query, gallery = _divided(images)
    divided: dict[Subset, list[LabelledImage]] = {"query": query, "gallery": gallery}
    if "train" in subsets:
        divided = {"train": images}
        if len(subsets) > 1:
            notes.append("everybody is trained on: there is nobody left to evaluate with")
    elif not query:
        raise UserError(f"{root} holds no person with two images: there is nothing to look for")
    for note in notes:
        _log.warning(note)
    if files.skipped:
        notes.append(skipped_sentence(files.skipped))  # which was told as they were listed
    data = Dataset.read("identities", root, subsets, lambda subset: divided.get(subset, []))
    return replace(data, notes=notes, people=dict(labels.people), has_cameras=not without)


def _camera(name: str) -> int | None:
    """Of `person/cam_2/...` or `person/cam_2...`."""
    match = _CAMERA.match(name.partition("/")[2])
    return int(match[1]) if match else None


def _divided(images: list[LabelledImage]) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Queries and gallery."""
    of_person = Counter(image.identity for image in images)
    seen: set[tuple[int, int]] = set()
    query, gallery = list[LabelledImage](), list[LabelledImage]()
    for image in images:
        shot = (image.identity, image.camera)
        asks = shot not in seen and of_person[image.identity] > 1
        seen.add(shot)
        (query if asks else gallery).append(image)
    return query, gallery
