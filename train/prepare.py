"""What is settled before the first step: whose images are trained on, that every file is read, what is evaluated."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, replace

from mgn_deploy.datasets import Dataset, LabelledImage, open_data
from mgn_deploy.datasets.dataset import JUNK
from mgn_deploy.errors import UnreadableImage, UserError, first_names
from mgn_deploy.images.check import ImageFacts, check_image
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.truth import Truth
from mgn_deploy.train.recipe import Batch

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Prepared:
    """Data that can be trained on.

    `data` has people alone in `train`, and no `query` and `gallery` where nothing is evaluated. `facts` tell of each
    training image, by its path below the root: identity (a name where the data set has names), camera, size in bytes,
    CRC-32 (`ImageFacts`). `people` are the identities in the order of their classes.
    """

    data: Dataset
    facts: dict[str, list[int | str]]
    people: list[int | str]


def open_training_data(spec: str, evaluate: bool = True) -> Dataset:
    """List the training images of a `--data` argument and, where they are there, query and gallery.

    Raises:
        UserError: as `open_data` for the training images; of the others it is a warning.
    """
    if evaluate:
        try:
            return open_data(spec, ("train", "query", "gallery"))
        except UserError as error:
            data = open_data(spec, ["train"])  # raises where it is these that are missing
            note = f"query and gallery are not read: {error}"
            _log.warning(note)
            return replace(data, notes=[*data.notes, note])
    return open_data(spec, ["train"])


def prepare(data: Dataset, batch: Batch, evaluate: bool = True, progress: Progress | None = None) -> Prepared:
    """Take out who is nobody and an evaluation that cannot be done, and read the header and the end of every file.

    Args:
        data: `train`, and `query` and `gallery` for the evaluation.
        batch: what the people are counted for.
        evaluate: whether query and gallery are wanted.
        progress: called as ("checking images", done, total).

    Raises:
        UserError: fewer than two people, or files that cannot be read: the sentence counts them and names the first.
    """
    data = replace(data, train=_people(data, batch))
    if not evaluate or not _can_be_evaluated(data):
        data = replace(data, query=[], gallery=[])
    _log.info(
        f"{len(data.train)} training images, {len(data.query)} queries, {len(data.gallery)} gallery images of "
        f"{data.root}"
    )
    found = _check(data, progress)
    names = {number: name for name, number in data.people.items()}
    facts: dict[str, list[int | str]] = {}
    for image, one in zip(data.train, found, strict=False):
        person = names.get(image.identity, image.identity)
        facts[os.path.relpath(image.path, data.root)] = [person, image.camera, one.size, one.crc]
    identities = sorted({image.identity for image in data.train})
    return Prepared(data, facts, [names.get(identity, identity) for identity in identities])


def _people(data: Dataset, batch: Batch) -> list[LabelledImage]:
    images = [image for image in data.train if image.identity != JUNK and data.is_person(image.identity)]
    if len(images) < len(data.train):
        _log.warning(f"{len(data.train) - len(images)} training images of junk or distractors are not trained on")
    counts = Counter(image.identity for image in images)
    if len(counts) < 2:
        raise UserError(f"training needs images of at least two identities; these have {len(counts)}")
    if len(counts) < batch.identities:
        _log.warning(f"batches are of the {len(counts)} people that there are, not of {batch.identities}")
    few = sum(count < batch.images for count in counts.values())
    if few:
        _log.warning(f"{few} of {len(counts)} people have fewer than {batch.images} images: batches repeat some")
    return images


def _can_be_evaluated(data: Dataset) -> bool:
    if not data.query or not data.gallery:
        _log.warning("the run is not evaluated: there are no queries, or no gallery to find them in")
        return False
    alone = len(Truth.of_dataset(data).unmatched())
    if alone == len(data.query):
        _log.warning("the run is not evaluated: no query has an image of the same person by another camera in gallery")
    elif alone:
        _log.warning(
            f"{alone} of the {len(data.query)} queries have no image of the same person by another camera in gallery: "
            "they do not count"
        )
    return alone < len(data.query)


def _check(data: Dataset, progress: Progress | None) -> list[ImageFacts]:
    """Check the files of all subsets, and return the facts in the order of train, query, gallery."""
    images = [*data.train, *data.query, *data.gallery]
    facts: list[ImageFacts] = []
    broken: list[str] = []
    for done, (image, found) in enumerate(zip(images, in_order(_facts_or_problem, images), strict=True), start=1):
        if isinstance(found, ImageFacts):
            facts.append(found)
        else:
            within = image.path.is_relative_to(data.root)
            broken.append(f"{image.path.relative_to(data.root) if within else image.path} ({found})")
        if progress and (done % 100 == 0 or done == len(images)):
            progress("checking images", done, len(images))
    if broken:
        without = " (query and gallery are not read with --no-evaluate)" if data.query else ""
        raise UserError(
            f"{len(broken)} of the {len(images)} images of {data.root} cannot be read: {first_names(broken)}; replace "
            f"or delete them{without}"
        )
    return facts


def _facts_or_problem(image: LabelledImage) -> ImageFacts | str:
    try:
        return check_image(image.path)
    except UnreadableImage as error:
        return str(error)
