"""The embedding store: a folder of row-aligned shards that neither a power cut nor a flipped bit can make lie.

    STORE/manifest.json                  what made every row, and each shard's files, number of rows and SHA-256
    STORE/shard-00000-1f3a9c2e.npy       float16 or float32 [rows, dim]; NaN in the rows of failed images
    STORE/shard-00000-1f3a9c2e.parquet   one row for each row of the .npy: path, size, mtime, status, error, ...

The manifest is replaced by rename, after fsync of the files that it newly names: a file that it does not name does not
exist. File names end with the beginning of their content's hash, so that no file is ever written over. A path that is
embedded again later (the file had changed) has a row in a later shard, which counts.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.errors import UserError
from mgn_deploy.files import sha256_bytes
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest
from mgn_deploy.gallery.row import Row, rows_of

SHARD_ROWS = 1024  # rows of a whole shard: what a store of a million images is divided into


class Shard:
    """One shard of a store: opened by its sizes, read when it is asked for, and checked when it is first read.

    Attributes:
        rows: of images, failures too.
        kept: the embeddings, where they are to stay in memory.
    """

    def __init__(self, folder: Path, entry: ShardEntry, manifest: StoreManifest, *, check: bool = True) -> None:
        """Read the shard's rows.

        Raises:
            UserError: its Parquet is missing, damaged or another store's, or (with `check`) the two files' sizes do not
                agree.
        """
        self.entry = entry
        self.array_path = folder / f"{entry.name}.npy"
        self.rows_path = folder / f"{entry.name}.parquet"
        self.folder = folder
        self._dtype = np.dtype(manifest.dtype)
        self._checked = entry.array_sha256 is None
        self.kept: np.ndarray | None = None
        self.rows = self._read_rows()
        self._shape = (len(self.rows), manifest.dim)
        if check:
            self.check_size()

    def array(self) -> np.ndarray:
        """The embeddings `[rows, dim]`, read from disk; the first time their hash is checked.

        Raises:
            UserError: the file is damaged or cannot be read.
        """
        if self.kept is not None:
            return self.kept
        content = self._read(self.array_path)
        if not self._checked and sha256_bytes(content) != self.entry.array_sha256:
            raise self._damaged(self.array_path, "its SHA-256 is not the manifest's")
        self._checked = True
        return np.frombuffer(content, self._dtype, offset=len(content) - self._nbytes).reshape(self._shape)

    def mapped(self) -> np.ndarray:
        """The embeddings, mapped from disk, after their hash is checked; those that are kept, from memory."""
        if self.kept is not None:
            return self.kept
        self.verify()
        return np.load(self.array_path, mmap_mode="r")

    def verify(self) -> None:
        """Compare the embeddings' bytes with the manifest's hash, unless that was done.

        Raises:
            UserError: they differ, or the file cannot be read.
        """
        if not self._checked:
            self.array()

    @property
    def _nbytes(self) -> int:
        return self._shape[0] * self._shape[1] * self._dtype.itemsize

    def _read_rows(self) -> list[Row]:
        content = self._read(self.rows_path)
        if self.entry.rows_sha256 and sha256_bytes(content) != self.entry.rows_sha256:
            raise self._damaged(self.rows_path, "its SHA-256 is not the manifest's")
        try:
            # Read here, not by Arrow: it reads meaning into a path (`key=value`, `scheme:`) and wants it in UTF-8.
            file = pq.ParquetFile(pa.BufferReader(content))
            if self.entry.count not in (None, file.metadata.num_rows):
                raise ValueError(f"{file.metadata.num_rows} rows, the manifest has {self.entry.count}")
            # And without Arrow's threads: one that still lives as the process ends aborts it (apache/arrow#50482).
            return rows_of(file.read(use_threads=False))
        except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, pa.ArrowException) as error:
            raise self._damaged(self.rows_path, str(error)) from None

    def check_size(self) -> None:
        """Raise UserError where the .npy is no array of so many rows, as far as its first bytes and its size tell."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self._dtype.str, "fortran_order": False, "shape": self._shape}
        )
        try:
            with open(self.array_path, "rb") as file:
                begin = file.read(header.tell())
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(self.array_path, error) from None
        if begin != header.getvalue() or size != header.tell() + self._nbytes:
            raise self._damaged(
                self.array_path, f"it is not {self._dtype} {list(self._shape)}, one row for each of its Parquet's"
            )

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise self._unreadable(path, error) from None

    def _unreadable(self, path: Path, error: OSError) -> UserError:
        if error.errno == errno.ENOENT:
            return self._damaged(path, "it is missing")
        return UserError(f"{path} cannot be read: {error.strerror}")

    def _damaged(self, path: Path, why: str) -> UserError:
        return UserError(f"{path} is damaged ({why}): `mgn-deploy store repair {self.folder}` makes it again")


def open_shards(folder: Path, manifest: StoreManifest) -> list[Shard]:
    """The manifest's shards, their rows read.

    Raises:
        UserError: a shard is missing, damaged or cannot be read.
    """
    return [Shard(folder, entry, manifest) for entry in manifest.shards]


def latest_rows(shards: Iterable[Shard]) -> list[tuple[Row, Shard, int]]:
    """The latest row of each name, with its shard and its index in it, in the order of the rows."""
    latest: dict[str, tuple[Row, Shard, int]] = {}
    for shard in shards:
        for index, row in enumerate(shard.rows):
            latest.pop(row.name, None)  # which would keep its place among the others
            latest[row.name] = (row, shard, index)
    return list(latest.values())


def array_bytes(embeddings: np.ndarray) -> bytes:
    """The `.npy` file of embeddings."""
    buffer = io.BytesIO()
    np.save(buffer, embeddings)
    return buffer.getvalue()
