"""The manifest of an embedding store: what made every row, and the store's shards."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mgn_deploy.bundle.kinds import refuse_other_kind
from mgn_deploy.choices import Dtype
from mgn_deploy.errors import UserError, first_problem

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 256 * 2**20  # of a store of a thousand million images
_V1_SHARD = re.compile(r"(shard-\d{5,})\.parquet")
_SHA256 = r"^[0-9a-f]{64}$"


class ShardEntry(BaseModel):
    """A shard as the manifest names it; without hashes where a store of schema 1 has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^shard-\d{5,}(-[0-9a-f]{8})?$")  # of its two files, before .npy and .parquet
    count: int | None = Field(ge=1, le=2**31)
    array_sha256: str | None = Field(pattern=_SHA256)
    rows_sha256: str | None = Field(pattern=_SHA256)


class StoreManifest(BaseModel):
    """What made every row of a store, in which a run that differs is refused, and the store's shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = 2
    bundle_id: str
    backend: str
    preprocessing: str
    dim: int = Field(ge=1, le=2**20)
    dtype: Dtype
    # Where the bundle was then; says nothing about the rows.
    bundle_path: str | None = Field(None, pattern=r"^[^\x00]*$")
    source: str  # what the rows' paths are below, as a URI: file: (which holds any name's bytes), s3:, ...
    shards: tuple[ShardEntry, ...] = ()

    @field_validator("source")
    @classmethod
    def _source(cls, source: str) -> str:
        urlsplit(source)  # a ValueError where it is no URI
        if "\0" in source or "%00" in source:
            raise ValueError("it has a NUL character")
        return source


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a store; one of schema 1 gets its shards from the folder, without hashes.

    Raises:
        UserError: not a store, or one of a later schema.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(MOST_MANIFEST_BYTES))
        version = content["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not an embedding store (no {MANIFEST}): `mgn-deploy embed DIR -o {folder}` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path} is not the manifest of an embedding store") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{folder} has store schema {version!r} and this mgn-deploy reads {SCHEMA_VERSION}: upgrade mgn-deploy"
        )
    try:
        manifest = StoreManifest.model_validate(content)
    except ValidationError as error:
        refuse_other_kind(folder, "an embedding store")
        raise UserError(f"{path} is not an embedding store's: {first_problem(error)}") from None
    return (
        manifest if version == SCHEMA_VERSION else manifest.model_copy(update={"shards": _shards_of_schema_1(folder)})
    )


def folder_uri(folder: str | os.PathLike[str]) -> str:
    """A folder of this machine as a store's manifest keeps it, whatever the bytes of its name are."""
    return Path(os.path.abspath(folder)).as_uri()


def folder_of(uri: str) -> Path | None:
    """The folder of this machine that a manifest's source is; None: it is another kind of source."""
    parts = urlsplit(uri)
    return Path(os.fsdecode(unquote_to_bytes(parts.path))) if parts.scheme == "file" else None


def _shards_of_schema_1(folder: Path) -> tuple[ShardEntry, ...]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    found = sorted((match[1] for match in map(_V1_SHARD.fullmatch, names) if match), key=lambda name: int(name[6:]))
    return tuple(ShardEntry(name=name, count=None, array_sha256=None, rows_sha256=None) for name in found)
