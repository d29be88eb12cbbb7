"""One enrolled person, and the person's file."""

from __future__ import annotations

import io
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.files import BROKEN_ZIP, write_bytes

MAX_NAME = 100


@dataclass(frozen=True)
class Person:
    """An enrolled person.

    Attributes:
        name: as it was given, in Unicode's composed form (NFC).
        embeddings: unit rows float32 `[n, dim]`, one an image.
        images: SHA-256 of each image's bytes or pixels.
        enrolled: when the person was first enrolled, UTC in ISO 8601.
    """

    name: str
    embeddings: np.ndarray
    images: tuple[str, ...]
    enrolled: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the embeddings."""
        return {"name": self.name, "images": len(self.embeddings), "enrolled": self.enrolled}


def check_name(name: str) -> str:
    """A person's name in Unicode's composed form.

    Raises:
        UserError: it is empty or longer than 100 characters, begins or ends with a space, begins with a dot or a dash,
            or holds a slash, a backslash or a character that cannot be seen.
    """
    if not isinstance(name, str):
        raise UserError(f"a person's name is a text, not {name!r}")
    name = unicodedata.normalize("NFC", name)
    if not 1 <= len(name) <= MAX_NAME:
        raise UserError(f"a person's name has 1 to {MAX_NAME} characters, not {len(name)}")
    if not name.isprintable() or name.strip() != name or name[0] in ".-" or "/" in name or "\\" in name:
        raise UserError(
            f"{name!r} cannot be a person's name: no slashes, no characters that cannot be seen, no spaces at the "
            "ends, no dot or dash at the beginning"
        )
    return name


def read_person(path: Path, dim: int) -> Person | None:
    """A person's file; None where it was removed meanwhile."""
    damaged = f"{path} is damaged: delete it and enrol the person again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            embeddings, about = arrays["embeddings"], json.loads(str(arrays["about"]))
        person = Person(check_name(about["name"]), embeddings, tuple(about["images"]), str(about["enrolled"]))
    except (*BROKEN_ZIP, ValueError, TypeError, KeyError, UserError):
        raise UserError(damaged) from None
    good = embeddings.dtype == np.float32 and embeddings.shape == (len(person.images), dim) and len(embeddings)
    if not good or not np.isfinite(embeddings).all():
        raise UserError(damaged)
    return person


def write_person(path: Path, person: Person) -> None:
    about = {"name": person.name, "images": person.images, "enrolled": person.enrolled}
    buffer = io.BytesIO()
    np.savez(buffer, embeddings=person.embeddings, about=np.array(json.dumps(about)))
    write_bytes(path, buffer.getbuffer())
