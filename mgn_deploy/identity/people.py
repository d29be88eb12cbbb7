"""The folder of enrolled people.

    PEOPLE/manifest.json        the bundle that embedded every image, and the embeddings' length
    PEOPLE/person-0a1b2c3d4e5f.npz     one person: name, float32 embeddings [n, dim], SHA-256 of each image, the day

Each file is written beside and renamed, so that a reader sees a person before or after a change; writers take turns by
a lock. A person's file is not named by the person, so a rename is one write and no name is ever a path.
"""

from __future__ import annotations

import os
import unicodedata
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mgn_deploy.bundle.kinds import refuse_other_kind
from mgn_deploy.errors import UserError, first_problem
from mgn_deploy.files import holds_nothing, sync_folder, write_text
from mgn_deploy.identity.calibration import check_same_id
from mgn_deploy.identity.person import Person, check_name, read_person, write_person
from mgn_deploy.locks import locked

MANIFEST = "manifest.json"
LOCK_SECONDS = 30


class PeopleManifest(BaseModel):
    """What embedded everybody of a people folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["people"] = "people"
    schema_version: Literal[1] = 1
    bundle_id: str
    dim: int = Field(ge=1)


@dataclass(frozen=True)
class Enrolled:
    """Everybody of a people folder at one moment; it does not change, so any thread may use it."""

    bundle_id: str
    people: tuple[Person, ...]

    @property
    def names(self) -> list[str]:
        """In the order of `people`: by name."""
        return [person.name for person in self.people]

    @cached_property
    def rows(self) -> np.ndarray:
        """Everybody's embeddings, `[n, dim]`."""
        return np.concatenate([person.embeddings for person in self.people])

    @cached_property
    def starts(self) -> np.ndarray:
        """Where in `rows` each person's begin."""
        return np.cumsum([0, *(len(person.embeddings) for person in self.people[:-1])])


class People:
    """A people folder. What it changes is on disk when the call returns; several threads and processes may call it.

    Attributes:
        bundle_id: of the bundle that embeds its images.
        dim: of an embedding.
    """

    def __init__(self, folder: Path, manifest: PeopleManifest) -> None:
        self.folder = folder
        self.bundle_id, self.dim = manifest.bundle_id, manifest.dim

    def __repr__(self) -> str:
        return f"People({str(self.folder)!r}, {len(_files(self.folder))} people, of bundle {self.bundle_id[:12]})"

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> People:
        """Open a people folder.

        Raises:
            UserError: no such folder, or one of something else or of a later schema.
        """
        folder = Path(folder)
        return cls(folder, _read_manifest(folder))

    @classmethod
    def create(cls, folder: str | os.PathLike[str], bundle_id: str, dim: int) -> People:
        """Open a people folder, or make it where there is none, for the embeddings of a bundle.

        Raises:
            UserError: the folder belongs to another bundle, holds something else or cannot be written.
        """
        folder = Path(folder)
        try:
            if not (folder / MANIFEST).exists():
                if folder.exists() and not holds_nothing(folder):
                    raise UserError(f"{folder} exists and holds no enrolled people: choose another path")
                folder.mkdir(parents=True, exist_ok=True)
                with _writing(folder):
                    if not (folder / MANIFEST).exists():
                        manifest = PeopleManifest(bundle_id=bundle_id, dim=dim)
                        write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
        people = cls.open(folder)
        check_same_id(f"{folder}", people.bundle_id, bundle_id)
        return people

    def load(self) -> Enrolled:
        """Everybody who is enrolled now, by name.

        Raises:
            UserError: a person's file is damaged.
        """
        return Enrolled(self.bundle_id, tuple(person for _, person in self._read()))

    def enrol(self, name: str, embeddings: np.ndarray, images: Sequence[str]) -> Person:
        """Add images of a person, who is new or enrolled already; images that are enrolled as this person are skipped.

        Args:
            name: 1 to 100 characters that can be seen, without slashes; `check_name` has the rules.
            embeddings: unit rows `[n, dim]`.
            images: SHA-256 of each image, `n` of them.

        Returns:
            The person with all images.

        Raises:
            UserError: a name that cannot be one, embeddings of another length or not finite, or a folder that cannot
                be written; nothing has changed.
        """
        name = check_name(name)
        embeddings = np.asarray(embeddings, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(images) or not len(images):
            raise UserError(f"{name!r} needs one embedding for each of at least one image")
        if embeddings.shape[1] != self.dim or not np.isfinite(embeddings).all():
            raise UserError(
                f"embeddings of {self.dim} finite numbers are enrolled in {self.folder}, not {list(embeddings.shape)}"
            )
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with _writing(self.folder):
            path, person = self._find(name) or (
                self.folder / f"person-{uuid.uuid4().hex[:12]}.npz",
                Person(name, np.empty((0, self.dim), np.float32), (), started),
            )
            # The first of equal images that are not enrolled yet.
            new = [
                index
                for index, image in enumerate(images)
                if image not in person.images and image not in images[:index]
            ]
            person = replace(
                person,
                embeddings=np.concatenate([person.embeddings, embeddings[new]]),
                images=(*person.images, *(images[index] for index in new)),
            )
            if new:
                write_person(path, person)
        return person

    def rename(self, name: str, new_name: str) -> Person:
        """Give a person another name.

        Raises:
            UserError: nobody has the name, somebody has the new one, or it cannot be one.
        """
        new_name = check_name(new_name)
        with _writing(self.folder):
            path, person = self._require(name)
            if new_name != person.name and self._find(new_name):
                raise UserError(f"{self.folder} has a {new_name!r} already: remove that person or choose another name")
            person = replace(person, name=new_name)
            write_person(path, person)
        return person

    def remove(self, name: str) -> Person:
        """Forget a person: the file is deleted.

        Raises:
            UserError: nobody has the name.
        """
        with _writing(self.folder):
            path, person = self._require(name)
            path.unlink()
            sync_folder(self.folder)
        return person

    def _read(self) -> list[tuple[Path, Person]]:
        found = []
        for path in _files(self.folder):
            person = read_person(path, self.dim)
            if person is not None:
                found.append((path, person))
        return sorted(found, key=lambda pair: pair[1].name)

    def _find(self, name: str) -> tuple[Path, Person] | None:
        wanted = unicodedata.normalize("NFC", name)
        return next((pair for pair in self._read() if pair[1].name == wanted), None)

    def _require(self, name: str) -> tuple[Path, Person]:
        found = self._find(name)
        if found is None:
            raise UserError(f"nobody named {name!r} is enrolled in {self.folder}: `mgn-deploy people list` names them")
        return found


def _read_manifest(folder: Path) -> PeopleManifest:
    path = folder / MANIFEST
    try:
        return PeopleManifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no enrolled people: `mgn-deploy enrol NAME IMAGES --people {folder} --bundle BUNDLE` "
            "enrols"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        refuse_other_kind(folder, "a folder of enrolled people")
        raise UserError(
            f"{path} is not the manifest of a people folder that this mgn-deploy reads ({first_problem(error)}): "
            "choose another folder for enrolled people, or upgrade mgn-deploy"
        ) from None


def _files(folder: Path) -> list[Path]:
    try:  # `Path.glob` takes a folder that may not be listed for an empty one
        return sorted(folder / name for name in os.listdir(folder) if fnmatch(name, "person-*.npz"))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        busy = f"another process has been writing to {folder} for {LOCK_SECONDS} s: try again later"
        with locked(folder, busy, LOCK_SECONDS):
            yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None
