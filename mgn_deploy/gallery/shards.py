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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.errors import UserError
from mgn_deploy.files import is_utf8, printable, sha256_bytes
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest

SHARD_ROWS = 1024  # rows of a whole shard: what a store of a million images is divided into

ROWS = pa.schema(
    [
        ("path", pa.string()),  # below the source; bytes that are not UTF-8 as \\xNN
        ("path_bytes", pa.binary()),  # the name itself, only where it is not UTF-8
        ("size", pa.int64()),  # bytes
        ("mtime_ns", pa.int64()),
        ("sha256", pa.binary(32)),  # of the file's content
        ("status", pa.string()),  # ok, failed
        ("error", pa.string()),
        ("identity", pa.int32()),
        ("camera", pa.int32()),
        ("frame", pa.int64()),  # of a video, from 1
        ("time_s", pa.float64()),  # of that frame, from the video's start
        ("track", pa.int64()),
        ("box", pa.list_(pa.float32(), 4)),  # left, top, width, height in pixels of the frame or photo
    ]
)
_SINCE_2 = {"sha256", "frame", "time_s", "track", "box"}


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a store.

    Attributes:
        name: its path below the store's source.
        size: of the file, in bytes; None where even that could not be read.
        mtime_ns: the file's modification time, in ns since 1970; None as `size`.
        error: None where it was embedded, else the reason, in valid UTF-8.
        identity: the person's number, where the user said how to know it.
        camera: the camera's number, as `identity`.
        sha256: of the file's content; None where it could not be read, and in stores of schema 1.
        frame: the number of a video's frame, from 1.
        time_s: of that frame, in seconds from the video's start.
        track: the tracker's number of the person in the video.
        box: left, top, width and height of the crop in pixels of the frame or photo.
    """

    name: str
    size: int | None
    mtime_ns: int | None
    error: str | None
    identity: int | None
    camera: int | None
    sha256: bytes | None = None
    frame: int | None = None
    time_s: float | None = None
    track: int | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def path(self) -> str:
        """The name as UTF-8 text."""
        return printable(self.name)

    @property
    def path_bytes(self) -> bytes | None:
        """The name itself, where it is not UTF-8."""
        return None if is_utf8(self.name) else os.fsencode(self.name)

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "ok" if self.error is None else "failed"

    @property
    def file(self) -> str:
        """The name below the source of the image or, where the row is a box, of the photo or video that it is in."""
        return self.name if self.box is None else self.name.rpartition("#")[0]


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
            return _rows(file.read(use_threads=False))
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


def rows_table(rows: Sequence[Row], names: Sequence[str] = ROWS.names) -> pa.Table:
    """Some columns of `ROWS`, by their names."""
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return pa.table(columns, schema=pa.schema([ROWS.field(name) for name in names]))


def rows_bytes(rows: Sequence[Row]) -> bytes:
    """The Parquet file of rows."""
    buffer = io.BytesIO()
    pq.write_table(rows_table(rows), buffer, compression="zstd")
    return buffer.getvalue()


def _rows(table: pa.Table) -> list[Row]:
    for field in ROWS:
        if field.name not in table.column_names and field.name in _SINCE_2:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        elif table.schema.field(field.name).type != field.type:
            raise ValueError(f"column {field.name} is {table.schema.field(field.name).type}, not {field.type}")
    columns: dict[str, list[Any]] = table.select(ROWS.names).to_pydict()
    if None in columns["path"]:
        raise ValueError("a row without a path")
    columns["box"] = [box and tuple(box) for box in columns["box"]]
    del columns["status"]
    raw, names = columns.pop("path_bytes"), columns.pop("path")
    columns["name"] = [name if raw is None else os.fsdecode(raw) for name, raw in zip(names, raw, strict=True)]
    return [Row(*values) for values in zip(*(columns[key] for key in Row.__dataclass_fields__), strict=True)]
