"""Image files enrolled and identified."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.files import sha256_file
from mgn_deploy.identity.calibration import (
    DEFAULT_FAR,
    Calibration,
    check_far,
    check_prior,
    check_same_id,
    how_to_calibrate,
)
from mgn_deploy.identity.identify import CANDIDATES, PRIOR_KNOWN, Identification, identify
from mgn_deploy.identity.people import People
from mgn_deploy.identity.person import Person, check_name
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import image_paths
from mgn_deploy.progress import Progress

_CHUNK = 256  # images whose pixels are in memory at a time
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Enrolment:
    """A person after enrolment, how many images are new, and what a reader should look at again."""

    person: Person
    added: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.person.to_dict(), "added": self.added, "notes": list(self.notes)}


@dataclass(frozen=True)
class EmbeddedImages:
    """Images that were embedded, and those that could not be read.

    Attributes:
        paths: of the `n` embedded files.
        embeddings: unit rows float32 `[n, dim]`.
        failed: path and reason of each file that could not be read.
        skipped: how many files of the folders are no image, by extension.
    """

    paths: list[Path]
    embeddings: np.ndarray
    failed: list[tuple[Path, str]]
    skipped: Counter[str]


def enrol_images(
    name: str,
    sources: Sequence[str | os.PathLike[str]],
    people: str | os.PathLike[str],
    embedder: Embedder,
    *,
    batch_size: int = 8,
) -> Enrolment:
    """Enrol a person by image files, in a people folder that is made where there is none.

    Images that are somebody else's too, and names that differ in case only, are logged and noted; where the bundle has
    a calibration, so are images that are unlike the person's others, and people who are like somebody else of the list.

    Args:
        name: see `check_name`.
        sources: files, or folders of them.
        people: the people folder.
        embedder: opened from the bundle that embeds everybody in it.
        batch_size: images an engine call.

    Raises:
        UserError: an image cannot be read, the folder is another bundle's or cannot be written, or the name cannot be
            one. Nobody is enrolled then.
    """
    name = check_name(name)
    paths = image_paths(sources)
    if os.path.exists(people):
        folder = People.create(people, embedder.bundle.id, embedder.dim)  # refuses before any image is embedded
    calibration = Calibration.find(embedder.bundle)
    embeddings = embedder.embed(paths, batch_size=batch_size)
    folder = People.create(people, embedder.bundle.id, embedder.dim)
    return enrol_embeddings(name, embeddings, [sha256_file(path) for path in paths], paths, folder, calibration)


def enrol_embeddings(
    name: str,
    embeddings: np.ndarray,
    hashes: Sequence[str],
    titles: Sequence[str | os.PathLike[str]],
    folder: People,
    calibration: Calibration | None,
) -> Enrolment:
    """Enrol a person by embeddings of images; what looks like a mistake is logged and noted, as `enrol_images` says.

    Args:
        name: see `check_name`.
        embeddings: unit rows float32 `[n, dim]`.
        hashes: of the `n` images' content, by which one that is enrolled already is known.
        titles: what notes call the images.
        folder: of people.
        calibration: of the folder's bundle.

    Raises:
        UserError: the folder cannot be written, or the name cannot be one.
    """
    before = folder.load().people
    known = next((len(person.embeddings) for person in before if person.name == name), 0)
    person = folder.enrol(name, embeddings, hashes)
    added = len(person.embeddings) - known
    again = [f"images that are {person.name}'s already, or given twice: {len(hashes) - added} of {len(hashes)}"]
    notes = (
        *(again if added < len(hashes) else ()),
        *_mix_ups(person, before),
        *_doubts(person, before, titles, embeddings, calibration),
    )
    for note in notes:
        _log.warning(note)
    return Enrolment(person, added, notes)


def identify_images(
    sources: Sequence[str | os.PathLike[str]],
    people: str | os.PathLike[str],
    embedder: Embedder,
    *,
    far: float = DEFAULT_FAR,
    together: bool = False,
    prior: float = PRIOR_KNOWN,
    candidates: int = CANDIDATES,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> tuple[list[Identification], EmbeddedImages]:
    """`identify` the images of files and folders; those that cannot be read are logged and left out.

    Returns:
        The answers, and the images that they are about, with what could not be read and what was no image.

    Raises:
        UserError: not one image can be read, nobody is enrolled, or the people or the calibration are another bundle's.
    """
    check_far(far)
    check_prior(prior)
    folder = People.open(people)
    check_same_id(str(folder.folder), folder.bundle_id, embedder.bundle.id)
    enrolled, calibration = folder.load(), Calibration.find(embedder.bundle)
    images = embed_readable(sources, embedder, batch_size=batch_size, progress=progress)
    answers = identify(
        images.embeddings,
        enrolled,
        calibration,
        names=[str(path) for path in images.paths],
        far=far,
        together=together,
        prior=prior,
        candidates=candidates,
    )
    if calibration is None:
        note = f"no name and no probability without a calibration: {how_to_calibrate(embedder.bundle)}"
        answers = [replace(answer, note=note) for answer in answers]
    return answers, images


def embed_readable(
    sources: Sequence[str | os.PathLike[str]],
    embedder: Embedder,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> EmbeddedImages:
    """Embed the images of a list of files and folders; those that cannot be read are logged and left out.

    Raises:
        UserError: not one of them can be read, or what `image_paths` refuses.
    """
    skipped = Counter[str]()
    paths = image_paths(sources, skipped)
    read: list[Path] = []
    failed: list[tuple[Path, str]] = []
    rows: list[np.ndarray] = []
    for start in range(0, len(paths), _CHUNK):
        crops = []
        for path in paths[start : start + _CHUNK]:
            try:
                crops.append(read_crop(path, embedder.height, embedder.width))
                read.append(path)
            except UnreadableImage as error:
                failed.append((path, str(error)))
                _log.warning(f"cannot be read: {str(path)!r}: {error}")
        if crops:
            rows.append(embedder.embed(crops, batch_size=batch_size))
        if progress:
            progress("embedding", min(start + _CHUNK, len(paths)), len(paths))
    if not read:
        path, reason = failed[0]
        raise UserError(f"not one of {len(paths)} images can be read; the first, {str(path)!r}: {reason}")
    return EmbeddedImages(read, np.concatenate(rows), failed, skipped)


def _mix_ups(person: Person, before: Sequence[Person]) -> list[str]:
    """What can only be a mistake: one image of two people, and one name in two spellings."""
    notes = []
    for other in before:
        if other.name == person.name:
            continue
        if shared := len(set(person.images) & set(other.images)):
            notes.append(f"images of {person.name} that are enrolled as {other.name} too: {shared}; one name is wrong")
        if other.name.casefold() == person.name.casefold():
            notes.append(f"{person.name} and {other.name}, who is enrolled, are two people: names differ by case")
    return notes


def _doubts(
    person: Person,
    before: Sequence[Person],
    titles: Sequence[str | os.PathLike[str]],
    embeddings: np.ndarray,
    calibration: Calibration | None,
) -> list[str]:
    """What looks like a mistake: an image unlike the person's others, and somebody else who looks like the person."""
    if calibration is None:
        return []
    notes = []
    if len(person.embeddings) > 1:
        for title, row in zip(titles, embeddings, strict=True):
            others = np.sort(person.embeddings @ row)[:-1]  # the image itself is the most similar one
            chance = float(calibration.probability(others.mean(), 0.5))
            if chance < 0.1:
                notes.append(
                    f"{str(title)!r} is unlike the other images of {person.name} (p = {chance:.2g}): look again"
                )
    threshold = calibration.decide(DEFAULT_FAR).threshold
    for other in before:
        if other.name != person.name:
            similarity = float((embeddings @ other.embeddings.T).mean())
            if similarity >= threshold:
                notes.append(f"{person.name} looks like {other.name}, who is enrolled (similarity {similarity:.2f})")
    return notes
