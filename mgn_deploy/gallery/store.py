"""The embedding store: a folder of row-aligned shards that a power cut cannot make lie.

    STORE/manifest.json         the bundle, backend and preprocessing that made every row, and the embeddings' dtype
    STORE/shard-00000.npy       float16 or float32 [rows, dim]; NaN in the rows of failed images
    STORE/shard-00000.parquet   one row for each row of the .npy: path, size, mtime, status, error, identity, camera

A shard's Parquet file is written last, by rename after fsync: a shard without one does not exist. A path that is
embedded again later (the file had changed) has a row in a later shard, which counts.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.packages import import_problem

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
UNKNOWN = -2  # identity or camera of an image whose name gives none (-1 is Market-1501's junk)

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
    dtype: Literal["float32", "float16"]
    source: str  # the folder that the rows' paths are below, as a file: URI (which holds any name's bytes)


@dataclass(frozen=True)
class Row:
    """One image of a store. `name` is its path below the store's source folder."""

    name: str
    size: int | None
    mtime_ns: int | None
    error: str | None  # None: embedded; else the reason, valid UTF-8
    identity: int | None
    camera: int | None


class Store:
    """A store opened for reading. Its rows are the embedded images, in the order in which they were embedded.

    >>> store = Store.open("store")                  # doctest: +SKIP
    >>> store                                        # doctest: +SKIP
    Store('store', 19,732 images and 3 failures, float32 [19732, 2048], by openvino of bundle 0d4c1f9a2b7e)
    >>> store["0001_c1s1_000151_00.jpg"].shape       # doctest: +SKIP
    (2048,)
    >>> [row.name for row in store if row.camera == 1]    # doctest: +SKIP

    Attributes:
        rows: the embedded images; row i is that of `embeddings()[i]`.
        failures: the images that could not be read, with their `error`.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._source = Path(os.fsdecode(unquote_to_bytes(urlsplit(manifest.source).path)))
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        latest: dict[str, tuple[int, int, Row]] = {}
        self._arrays: list[np.ndarray] = []
        for shard, (array, rows) in enumerate(_shards(folder, manifest)):
            self._arrays.append(array)
            latest.update((row.name, (shard, index, row)) for index, row in enumerate(rows))
        self._locations: list[tuple[int, int]] = []  # of each row's embedding: shard, index in it
        for shard, index, row in sorted(latest.values(), key=lambda location: location[:2]):
            if row.error is None:
                self.rows.append(row)
                self._locations.append((shard, index))
            else:
                self.failures.append(row)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """Open a store, also one that is still being written: rows that are committed are seen.

        Raises:
            UserError: not a store, of a later schema, or with a damaged shard.
        """
        folder = Path(folder)
        return cls(folder, _read_manifest(folder))

    def __repr__(self) -> str:
        made = self.manifest
        return (
            f"Store({str(self.folder)!r}, {len(self):,} images and {len(self.failures):,} failures, "
            f"{made.dtype} [{len(self)}, {made.dim}], by {made.backend} of bundle {made.bundle_id[:12]})"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __contains__(self, name: object) -> bool:
        """Whether the image of this name was embedded."""
        return name in self._indices

    def __getitem__(self, name: str) -> np.ndarray:
        """The embedding of an image by its name: `[dim]` in the store's dtype, a copy.

        Raises:
            KeyError: no image of this name was embedded.
        """
        shard, index = self._locations[self._index(name)]
        return np.array(self._arrays[shard][index])

    def row(self, name: str) -> Row:
        """The row of an embedded image by its name.

        Raises:
            KeyError: no image of this name was embedded.
        """
        return self.rows[self._index(name)]

    def embeddings(self) -> np.ndarray:
        """`[len(store), dim]` in the store's dtype; mapped from disk where one whole shard is all there is."""
        if len(self._arrays) == 1 and len(self._arrays[0]) == len(self.rows):
            return self._arrays[0]
        result = np.empty((len(self.rows), self.manifest.dim), self.manifest.dtype)
        shards, indices = np.array(self._locations, np.int64).reshape(-1, 2).T
        for shard, array in enumerate(self._arrays):
            here = shards == shard
            result[here] = array[indices[here]]
        return result

    def path(self, row: Row) -> Path:
        """Where the image was when it was embedded."""
        return self._source / row.name

    def identities(self) -> np.ndarray:
        """int64 `[len(store)]`; UNKNOWN (-2) where the name gives none."""
        return np.array([UNKNOWN if row.identity is None else row.identity for row in self.rows], np.int64)

    def cameras(self) -> np.ndarray:
        """int64 `[len(store)]`; UNKNOWN (-2) where the name gives none."""
        return np.array([UNKNOWN if row.camera is None else row.camera for row in self.rows], np.int64)

    def to_pandas(self) -> pd.DataFrame:
        """A frame with one line an image: first those of `embeddings()`, in its order, then the failures.

        Columns: path (the image's name, as `store[name]` takes it), status (ok or failed), error, identity and camera
        (missing where the name gives none), size in bytes, mtime (UTC, in ns).

        Raises:
            CannotRun: pandas is not installed.
        """
        problem = import_problem("pandas", "pandas")
        if problem:
            raise CannotRun(f"to_pandas makes a frame of pandas: {problem}")
        import pandas as pd

        rows = [*self.rows, *self.failures]

        def integers(values: Iterable[int | None]) -> pd.Series:
            return pd.Series(list(values), dtype="Int64")

        return pd.DataFrame(
            {
                # As objects: pandas' own strings cannot hold a name that is not UTF-8.
                "path": pd.Series([row.name for row in rows], dtype=object),
                "status": pd.Series([_status(row) for row in rows], dtype=object),
                "error": pd.Series([row.error for row in rows], dtype=object),
                "identity": integers(row.identity for row in rows),
                "camera": integers(row.camera for row in rows),
                "size": integers(row.size for row in rows),
                "mtime": pd.to_datetime(integers(row.mtime_ns for row in rows), unit="ns", utc=True),
            }
        )

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {row.name: index for index, row in enumerate(self.rows)}

    def _index(self, name: str) -> int:
        if not isinstance(name, str):
            raise TypeError(f"a store is indexed by an image's name, not {name!r}; by number: .rows, .embeddings()")
        if name not in self._indices:
            raise KeyError(f"{self.folder} holds no embedding of {name!r}")
        return self._indices[name]


class StoreWriter:
    """The one process that adds shards to a store. A context manager: it holds the store's lock.

    Raises:
        UserError: on entering: another process writes to the store, or another bundle, backend or source made it.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: StoreManifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.known: dict[str, Row] = {}
        self._next = 0

    def __enter__(self) -> StoreWriter:
        try:
            if self.folder.exists() and not self._is_ours():
                raise UserError(f"{self.folder} exists and is not an embedding store: choose another place for it")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _is_ours(self) -> bool:
        """A store, an empty folder, or what a run leaves that was killed before it had written the manifest."""
        if (self.folder / MANIFEST).exists():
            _read_manifest(self.folder)  # raises where the manifest is of something else
            return True
        return self.folder.is_dir() and all(
            name == LOCK or (name.startswith(".mgn-") and name.endswith(".tmp")) for name in os.listdir(self.folder)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)  # which releases it

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {self.folder}: wait for it, or choose another store"
            ) from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be locked: {error.strerror}") from error
        if not (self.folder / MANIFEST).exists():
            with atomic_file(self.folder / MANIFEST) as file:
                file.write(self.manifest.model_dump_json(indent=2).encode() + b"\n")
        before = _read_manifest(self.folder)
        wanted = self.manifest.model_dump()
        for key, value in before.model_dump().items():
            if value != wanted[key]:
                raise UserError(
                    f"{self.folder} was made with {key} {_short(value)} and this run has {_short(wanted[key])}: "
                    "a store never mixes them; choose a new store"
                )
        committed = set()
        for number in _shard_numbers(self.folder):
            committed.add(_shard_name(number, "npy"))
            self._next = number + 1
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob("shard-*.npy")]:
            if left.name not in committed:
                left.unlink()  # of a run that was killed before its shard's Parquet
        for _, rows in _shards(self.folder, self.manifest):
            self.known.update((row.name, row) for row in rows)

    def commit(self, rows: Sequence[Row], embeddings: np.ndarray) -> None:
        """Add one shard: `rows` and their embeddings `[len(rows), dim]`, NaN where a row has an error.

        Raises:
            UserError: the disk is full; the store stays as it was.
        """
        number = self._next
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(self.manifest.dtype, copy=False))
        array_path, rows_path = (self.folder / _shard_name(number, kind) for kind in ("npy", "parquet"))
        with atomic_file(array_path) as file:
            file.write(buffer.getbuffer())
        try:
            with atomic_file(rows_path) as file:
                pq.write_table(_table(rows), file, compression="zstd")
        except BaseException:
            if not rows_path.exists():  # Ctrl-C can come right after the rename
                array_path.unlink(missing_ok=True)
            raise
        self._next += 1
        self.known.update((row.name, row) for row in rows)


def _read_manifest(folder: Path) -> StoreManifest:
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
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not an embedding store's: {field}: {first['msg']}") from None


def _shard_name(number: int, kind: str) -> str:
    return f"shard-{number:05d}.{kind}"


def _shard_numbers(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(int(match[1]) for match in map(_SHARD.fullmatch, names) if match)


def _shards(folder: Path, manifest: StoreManifest) -> Iterator[tuple[np.ndarray, list[Row]]]:
    """Each committed shard's mapped embeddings and rows."""
    for number in _shard_numbers(folder):
        array_path = folder / _shard_name(number, "npy")
        try:
            # Opened here, not by Arrow: it reads meaning into a path (`key=value`, `scheme:`) and wants it in UTF-8.
            with open(folder / _shard_name(number, "parquet"), "rb") as file:
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


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.table(
        {
            "path": [os.fsencode(row.name).decode("utf-8", "backslashreplace") for row in rows],
            "path_bytes": [None if _is_utf8(row.name) else os.fsencode(row.name) for row in rows],
            "size": [row.size for row in rows],
            "mtime_ns": [row.mtime_ns for row in rows],
            "status": [_status(row) for row in rows],
            "error": [row.error for row in rows],
            "identity": [row.identity for row in rows],
            "camera": [row.camera for row in rows],
        },
        schema=ROWS,
    )


def _status(row: Row) -> str:
    return "ok" if row.error is None else "failed"


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


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)
