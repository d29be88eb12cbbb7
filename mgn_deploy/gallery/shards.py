"""The embedding store: a folder of row-aligned shards that a power cut cannot make lie.

    STORE/manifest.json         the bundle, backend and preprocessing that made every row, and the embeddings' dtype
    STORE/shard-00000.npy       float16 or float32 [rows, dim]; NaN in the rows of failed images
    STORE/shard-00000.parquet   one row for each row of the .npy: path, size, mtime, status, error, identity, camera

A shard's Parquet file is written last, by rename after fsync: a shard without one does not exist. A path that is
embedded again later (the file had changed) has a row in a later shard, which counts.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from mgn_deploy.choices import Dtype
from mgn_deploy.errors import UserError, first_problem

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

ROWS = pa.schema(
    [
        ("path", pa.string()),  # below the source folder; bytes that are not UTF-8 as \\xNN
        ("path_bytes", pa.binary()),  # the name itself, only where it is not UTF-8
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),
        ("status", pa.string()),  # ok, failed
        ("error", pa.string()),
        ("identity", pa.int32()),
        ("camera", pa.int32()),
    ]
)
_SHARD = re.compile(r"shard-(\d{5,})\.parquet")


class StoreManifest(BaseModel):
    """What made every row of a store; a run that differs in any of it is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    bundle_id: str
    backend: str
    preprocessing: str
    dim: int
    dtype: Dtype
    source: str  # the folder that the rows' paths are below, as a file: URI (which holds any name's bytes)


@dataclass(frozen=True)
class Row:
    """One image of a store.

    Attributes:
        name: its path below the store's source folder.
        size: of the file, in bytes; None where even that could not be read.
        mtime_ns: the file's modification time, in ns since 1970; None as `size`.
        error: None where it was embedded, else the reason, in valid UTF-8.
        identity: the person's number, where the file's name gives it.
        camera: the camera's number, where the file's name gives it.
    """

    name: str
    size: int | None
    mtime_ns: int | None
    error: str | None
    identity: int | None
    camera: int | None

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "ok" if self.error is None else "failed"


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a store.

    Raises:
        UserError: not a store, or one of a later schema.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not an embedding store (no {MANIFEST}): `mgn-deploy embed DIR -o {folder}` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path} is not the manifest of an embedding store") from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has store schema {version!r} and this mgn-deploy reads {SCHEMA_VERSION}: upgrade mgn-deploy"
        )
    try:
        return StoreManifest.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is not an embedding store's: {first_problem(error)}") from None


def shard_name(number: int, kind: Literal["npy", "parquet"]) -> str:
    """The file name of a shard's embeddings (npy) or rows (parquet)."""
    return f"shard-{number:05d}.{kind}"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the committed shards, ascending."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(int(match[1]) for match in map(_SHARD.fullmatch, names) if match)


def read_shards(folder: Path, manifest: StoreManifest) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """Each committed shard's embeddings, `[rows, dim]` mapped from disk, and rows.

    Raises:
        UserError: a shard is damaged or cannot be read.
    """
    for number in shard_numbers(folder):
        array_path = folder / shard_name(number, "npy")
        try:
            # Opened here, not by Arrow: it reads meaning into a path (`key=value`, `scheme:`) and wants it in UTF-8.
            with open(folder / shard_name(number, "parquet"), "rb") as file:
                # And without Arrow's threads: one that still lives as the process ends aborts it (apache/arrow#50482).
                rows = _rows(pq.ParquetFile(pa.BufferReader(file.read())).read(use_threads=False))
            array = np.load(array_path, mmap_mode="r")
        except (OSError, ValueError, KeyError, EOFError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise UserError(f"{array_path} or its Parquet cannot be read: {error.strerror}") from None
            raise UserError(f"{array_path} or its Parquet is damaged ({error}): delete both and embed again") from None
        if array.shape != (len(rows), manifest.dim) or array.dtype != manifest.dtype:
            raise UserError(
                f"{array_path} is {array.dtype} {list(array.shape)} and its Parquet has {len(rows)} rows of "
                f"{manifest.dim} {manifest.dtype}: delete both and embed again"
            )
        yield array, rows


def rows_table(rows: Sequence[Row]) -> pa.Table:
    """The rows as a shard's Parquet file holds them."""
    return pa.table(
        {
            "path": [os.fsencode(row.name).decode("utf-8", "backslashreplace") for row in rows],
            "path_bytes": [None if _is_utf8(row.name) else os.fsencode(row.name) for row in rows],
            "size": [row.size for row in rows],
            "mtime_ns": [row.mtime_ns for row in rows],
            "status": [row.status for row in rows],
            "error": [row.error for row in rows],
            "identity": [row.identity for row in rows],
            "camera": [row.camera for row in rows],
        },
        schema=ROWS,
    )


def _rows(table: pa.Table) -> list[Row]:
    columns: dict[str, list[Any]] = table.to_pydict()
    return [
        Row(path if raw is None else os.fsdecode(raw), size, mtime_ns, error, identity, camera)
        for path, raw, size, mtime_ns, error, identity, camera in zip(
            *(columns[name] for name in ("path", "path_bytes", "size", "mtime_ns", "error", "identity", "camera")),
            strict=True,
        )
    ]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
