"""The one process that adds to an embedding store."""

from __future__ import annotations

import fcntl
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow.parquet as pq

from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.gallery.shards import (
    MANIFEST,
    Row,
    StoreManifest,
    read_manifest,
    read_shards,
    rows_table,
    shard_name,
    shard_numbers,
)

LOCK = ".lock"


class StoreWriter:
    """Adds shards to a store: a context manager that holds the store's lock.

    Attributes:
        known: the latest row of every image in the store, by name.

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
                raise UserError(f"{self.folder} exists and is not an embedding store: choose another path for it")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error
        try:
            self._take_lock()
            self._check_manifest()
            self._remove_uncommitted()
            for _, rows in read_shards(self.folder, self.manifest):
                self.known.update((row.name, row) for row in rows)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)  # which releases the lock

    def _is_ours(self) -> bool:
        """A store, an empty folder, or what a run leaves that was killed before it had written the manifest."""
        if (self.folder / MANIFEST).exists():
            read_manifest(self.folder)  # raises where the manifest is of something else
            return True
        return self.folder.is_dir() and all(
            name == LOCK or (name.startswith(".mgn-") and name.endswith(".tmp")) for name in os.listdir(self.folder)
        )

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {self.folder}: wait for it, or choose another store"
            ) from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be locked: {error.strerror}") from error

    def _check_manifest(self) -> None:
        """Write a new store's manifest, or compare that of an earlier run."""
        if not (self.folder / MANIFEST).exists():
            with atomic_file(self.folder / MANIFEST) as file:
                file.write(self.manifest.model_dump_json(indent=2).encode() + b"\n")
        wanted = self.manifest.model_dump()
        for key, value in read_manifest(self.folder).model_dump().items():
            if value != wanted[key]:
                raise UserError(
                    f"{self.folder} was made with {key} {_short(value)} and this run has {_short(wanted[key])}: "
                    "a store never mixes them; choose a new store"
                )

    def _remove_uncommitted(self) -> None:
        """Remove what a run left that was killed before it had written its shard's Parquet file."""
        numbers = shard_numbers(self.folder)
        self._next = numbers[-1] + 1 if numbers else 0
        committed = {shard_name(number, "npy") for number in numbers}
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob("shard-*.npy")]:
            if left.name not in committed:
                left.unlink()

    def commit(self, rows: Sequence[Row], embeddings: np.ndarray) -> None:
        """Add one shard: `rows` and their embeddings `[len(rows), dim]`, NaN where a row has an error.

        Raises:
            UserError: the disk is full; the store stays as it was.
        """
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(self.manifest.dtype, copy=False))
        array_path = self.folder / shard_name(self._next, "npy")
        rows_path = self.folder / shard_name(self._next, "parquet")
        with atomic_file(array_path) as file:
            file.write(buffer.getbuffer())
        try:
            with atomic_file(rows_path) as file:
                pq.write_table(rows_table(rows), file, compression="zstd")
        except BaseException:
            if not rows_path.exists():  # Ctrl-C can come right after the rename
                array_path.unlink(missing_ok=True)
            raise
        self._next += 1
        self.known.update((row.name, row) for row in rows)


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)
