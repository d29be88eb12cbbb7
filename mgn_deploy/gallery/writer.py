"""The one process that adds to an embedding store."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.files import holds_nothing, sha256_bytes, sync_folder, write_bytes, write_text
from mgn_deploy.gallery.manifest import MANIFEST, ShardEntry, StoreManifest, read_manifest
from mgn_deploy.gallery.row import Row, rows_bytes
from mgn_deploy.gallery.shards import SHARD_ROWS, Shard, array_bytes, open_shards
from mgn_deploy.locks import locked

PARTS = "parts"  # where the workers of a cluster write, until the one process that holds the lock takes their shards
_NOT_COMPARED = {"shards", "schema_version", "bundle_path"}
_log = logging.getLogger("mgn_deploy")


class StoreWriter:
    """Adds rows to a store: a context manager that holds the store's lock.

    Rows fill shards of `SHARD_ROWS` in the order in which they are added, whatever the number of calls: a store depends
    on its rows alone, not on where a run was stopped.

    Attributes:
        known: the latest row of every image in the store, by name.
        manifest: what the store's manifest holds now.

    Raises:
        UserError: on entering: another process writes to the store, another bundle or backend made it, or a shard is
            damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: StoreManifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.known: dict[str, Row] = {}
        self._rows: list[Row] = []  # of the last shard while it is not whole
        self._array = np.empty((0, manifest.dim), manifest.dtype)

    def __enter__(self) -> StoreWriter:
        with ExitStack() as stack:
            stack.enter_context(hold(self.folder))
            self._open()
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def room(self) -> int:
        """How many rows the last shard still takes."""
        return SHARD_ROWS - len(self._rows)

    def add(self, rows: Sequence[Row], embeddings: np.ndarray) -> None:
        """Add rows and their embeddings `[len(rows), dim]`, NaN where a row has an error; all or none are committed.

        Raises:
            UserError: the disk is full; the store stays as it was.
        """
        rows = [*self._rows, *rows]
        array = np.concatenate([self._array, embeddings.astype(self.manifest.dtype, copy=False)])
        whole = len(self.manifest.shards) - bool(self._rows)
        new = [
            self.write_shard(whole + number, rows[start : start + SHARD_ROWS], array[start : start + SHARD_ROWS])
            for number, start in enumerate(range(0, len(rows), SHARD_ROWS))
        ]
        self.replace([*self.manifest.shards[:whole], *new])
        self.known.update((row.name, row) for row in rows)
        rest = len(rows) // SHARD_ROWS * SHARD_ROWS
        self._rows, self._array = rows[rest:], array[rest:]

    def take(self, folder: Path, entry: ShardEntry) -> list[Row]:
        """Add the rows of a shard that another process wrote on the same file system, but for failures that the store
        has already; all its rows. A whole shard's files are moved, without reading the embeddings.

        Raises:
            UserError: the shard is damaged or missing, or the disk is full.
        """
        shard = Shard(folder, entry, self.manifest)
        new = [index for index, row in enumerate(shard.rows) if row.error is None or row != self.known.get(row.name)]
        if len(new) < SHARD_ROWS or self._rows:
            if new:
                self.add([shard.rows[index] for index in new], shard.array()[new])
            return shard.rows
        name = f"shard-{len(self.manifest.shards):05d}-{entry.name.rpartition('-')[2]}"
        for path in (shard.array_path, shard.rows_path):
            os.replace(path, self.folder / f"{name}{path.suffix}")
        sync_folder(self.folder)
        self.replace([*self.manifest.shards, entry.model_copy(update={"name": name})])
        self.known.update((row.name, row) for row in shard.rows)
        return shard.rows

    def replace(self, shards: Iterable[ShardEntry], **changes: str) -> None:
        """Commit a manifest with these shards, whose files are on disk, and remove the files that no shard names.

        Args:
            shards: all shards that the store has from now on.
            changes: other keys of the manifest.
        """
        manifest = self.manifest.model_copy(update={**changes, "shards": tuple(shards)})
        write_text(self.folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        self.manifest = manifest
        self._remove_unnamed()

    def relabel(self, labels: Mapping[str, tuple[int | None, int | None]]) -> None:
        """Give rows another identity and camera, by their names; embeddings stay as they are."""
        shards: list[ShardEntry] = []
        for shard in open_shards(self.folder, self.manifest):
            rows = [
                replace(row, identity=labels[row.name][0], camera=labels[row.name][1]) if row.name in labels else row
                for row in shard.rows
            ]
            shards.append(shard.entry if rows == shard.rows else self.write_shard(len(shards), rows, shard.array()))
            self.known.update((row.name, row) for row in rows)
        self.replace(shards)
        self._go_on()

    def rewrite(self, rows: Sequence[tuple[Row, Shard, int]]) -> None:
        """Replace all shards by whole ones of these rows, reading one old shard at a time where they are in order.

        Args:
            rows: as `latest_rows` gives them.
        """
        entries: list[ShardEntry] = []
        source, array = None, np.empty(0)
        for start in range(0, len(rows), SHARD_ROWS):
            part = rows[start : start + SHARD_ROWS]
            embeddings = np.empty((len(part), self.manifest.dim), self.manifest.dtype)
            for at, (_, shard, index) in enumerate(part):
                if source is not shard:
                    source, array = shard, shard.array()
                embeddings[at] = array[index]
            entries.append(self.write_shard(len(entries), [row for row, _, _ in part], embeddings))
        self.replace(entries)

    def write_shard(self, number: int, rows: Sequence[Row], array: np.ndarray) -> ShardEntry:
        """Write the files of a shard, for `replace`."""
        contents = {"npy": array_bytes(array), "parquet": rows_bytes(rows)}
        hashes = {kind: sha256_bytes(content) for kind, content in contents.items()}
        name = f"shard-{number:05d}-{sha256_bytes((hashes['npy'] + hashes['parquet']).encode())[:8]}"
        for kind, content in contents.items():
            write_bytes(self.folder / f"{name}.{kind}", content)
        return ShardEntry(name=name, count=len(rows), array_sha256=hashes["npy"], rows_sha256=hashes["parquet"])

    def _open(self) -> None:
        """Write a new store's manifest, or go on with that of an earlier run."""
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)  # of a run that was killed
        if not (self.folder / MANIFEST).exists():
            self.replace(())
            return
        found = read_manifest(self.folder)
        self.check_same(found, self.folder)
        shards = open_shards(self.folder, found)
        for shard in shards:
            self.known.update((row.name, row) for row in shard.rows)
        self.manifest = found.model_copy(update={"bundle_path": self.manifest.bundle_path or found.bundle_path})
        if found.schema_version == 1:
            _log.warning(f"{self.folder} has no checksums (schema 1): they are added now, of the files as they are")
            self.manifest = found.model_copy(update={"schema_version": 2})
            self.replace(map(_hashed, shards))
        self._remove_unnamed()
        self._go_on()

    def _go_on(self) -> None:
        """Take the last shard's rows to add to, where it is not whole."""
        if self.manifest.shards and (self.manifest.shards[-1].count or SHARD_ROWS) < SHARD_ROWS:
            last = Shard(self.folder, self.manifest.shards[-1], self.manifest)
            self._rows, self._array = last.rows, last.array()

    def check_same(self, found: StoreManifest, folder: Path) -> None:
        """Raise UserError where another store, `found` in `folder`, was made otherwise than this one."""
        wanted = self.manifest.model_dump(exclude=_NOT_COMPARED)
        for key, value in found.model_dump(exclude=_NOT_COMPARED).items():
            if value != wanted[key]:
                raise UserError(
                    f"{folder} was made with {key} {_short(value)} and this run has {_short(wanted[key])}: "
                    "a store never mixes them; choose a new store"
                )

    def _remove_unnamed(self) -> None:
        """Remove what a run left that was killed before its manifest named it, and what a new manifest dropped."""
        named = {f"{shard.name}.{kind}" for shard in self.manifest.shards for kind in ("npy", "parquet")}
        for left in [*self.folder.glob(".mgn-*.tmp"), *self.folder.glob("shard-*.*")]:
            if left.name not in named:
                left.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a store's lock, which a process that dies releases; a folder that is not there is made.

    Raises:
        UserError: another process holds it, or the folder is something else or cannot be written.
    """
    try:
        if (folder / MANIFEST).exists():
            read_manifest(folder)  # raises where the manifest is of something else
        elif folder.exists() and not holds_nothing(folder):
            raise UserError(f"{folder} exists and is not an embedding store: choose another path for it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    with locked(folder, f"another process is writing to {folder}: wait for it, or choose another store"):
        yield


def _hashed(shard: Shard) -> ShardEntry:
    return ShardEntry(
        name=shard.entry.name,
        count=len(shard.rows),
        array_sha256=sha256_bytes(shard.array_path.read_bytes()),
        rows_sha256=sha256_bytes(shard.rows_path.read_bytes()),
    )


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)
