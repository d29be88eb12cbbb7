"""An embedding store opened for reading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest, folder_of, read_manifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.shards import Shard, latest_rows
from mgn_deploy.packages import require

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

UNKNOWN = -2  # identity or camera of an image of which nobody said it (-1 is Market-1501's junk)


class Store:
    """A store opened for reading. Its rows are the embedded images, in the order in which they were embedded.

    Embeddings are read from disk a shard at a time; the first read of a shard compares its bytes with the manifest's
    SHA-256.

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

    def __init__(self, folder: Path, manifest: StoreManifest, known: Mapping[ShardEntry, Shard] | None = None) -> None:
        """Read the rows, but for those of shards that are `known`."""
        self.folder = folder
        self.manifest = manifest
        self.rows: list[Row] = []
        self.failures: list[Row] = []
        known = known or {}
        self._shards: list[Shard] = [known.get(entry) or Shard(folder, entry, manifest) for entry in manifest.shards]
        for shard in self._shards[:-1]:
            shard.kept = None
        if self._shards:
            self._shards[-1].kept = self._shards[-1].array()  # whose files a writer replaces as it adds rows
        number = {shard: number for number, shard in enumerate(self._shards)}
        where: list[tuple[int, int]] = []
        for row, shard, index in latest_rows(self._shards):
            if row.error is None:
                self.rows.append(row)
                where.append((number[shard], index))
            else:
                self.failures.append(row)
        # Of each row's embedding: the shard, and the index in it; ascending.
        self._where = np.array(where, np.int64).reshape(-1, 2)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: bool = False) -> Store:
        """Open a store, also one that is still being written: rows that are committed are seen.

        Args:
            folder: the store.
            verify: compare every byte with the manifest's SHA-256 now, not when a shard is first read.

        Raises:
            UserError: not a store, of a later schema, or with a damaged or missing shard.
        """
        store = cls._open(Path(folder), {})
        if verify:
            for shard in store._shards:
                shard.verify()
        return store

    def reopened(self) -> Store:
        """The store as it is on disk now; shards that are as they were are not read again.

        Raises:
            UserError: as of `open`.
        """
        return self._open(self.folder, {shard.entry: shard for shard in self._shards if shard.entry.rows_sha256})

    @classmethod
    def _open(cls, folder: Path, known: Mapping[ShardEntry, Shard]) -> Store:
        manifest = read_manifest(folder)
        while True:
            try:
                return cls(folder, manifest, known)
            except UserError:  # a writer may have replaced files between the manifest's reading and theirs
                before, manifest = manifest, read_manifest(folder)
                if manifest == before:
                    raise

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
        return self.take(np.array([self._index(name)]))[0]

    def row(self, name: str) -> Row:
        """The row of an embedded image by its name.

        Raises:
            KeyError: no image of this name was embedded.
        """
        return self.rows[self._index(name)]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The embeddings a shard at a time, for stores larger than memory: rows `[start, stop)` and their `[n, dim]`.

        Raises:
            UserError: a shard is damaged.
        """
        start = 0
        shards, indices = self._where.T
        for number, shard in enumerate(self._shards):
            here = indices[shards == number]
            if len(here):
                array = shard.array()
                yield slice(start, start + len(here)), array if len(here) == len(array) else array[here]
                start += len(here)

    def embeddings(self) -> np.ndarray:
        """`[len(store), dim]` in the store's dtype; mapped from disk where one whole shard is all there is.

        Raises:
            UserError: a shard is damaged.
        """
        if len(self._shards) == 1 and len(self._shards[0].rows) == len(self.rows):
            return self._shards[0].mapped()
        result = np.empty((len(self.rows), self.manifest.dim), self.manifest.dtype)
        for rows, block in self.blocks():
            result[rows] = block
        return result

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings `[n, dim]` of rows given by number, int64 `[n]`: only their shards are read.

        Raises:
            UserError: a shard is damaged.
        """
        shards, indices = self._where[rows].T
        result = np.empty((len(rows), self.manifest.dim), self.manifest.dtype)
        for number in np.unique(shards):
            here = shards == number
            result[here] = self._shards[number].mapped()[indices[here]]
        return result

    def find_bundle(self) -> Bundle:
        """The bundle that embedded the store, where it was then.

        Raises:
            UserError: it is not there, cannot be opened or is another one now: which one is wanted.
        """
        wanted, path = f"{self.folder} was embedded by bundle {self.manifest.bundle_id[:12]}", self.manifest.bundle_path
        if path is None:
            raise UserError(f"{wanted}: give its folder by --bundle")
        if not os.path.isdir(path):
            raise UserError(f"{wanted}, which is no longer in {path}: give --bundle")
        try:
            bundle = Bundle.open(path)
        except UserError as error:
            raise UserError(f"{wanted}, and {error}; or give another copy of it by --bundle") from None
        if bundle.id != self.manifest.bundle_id:
            raise UserError(f"{wanted}, and {bundle.folder} is {bundle.id[:12]} now: give the right one by --bundle")
        return bundle

    def path(self, row: Row) -> Path:
        """Where the image was when it was embedded.

        Raises:
            UserError: its source is no folder of this machine, or its name leads out of it.
        """
        folder = folder_of(self.manifest.source)
        if folder is None:
            raise UserError(f"{row.name!r} of {self.folder} lies in {self.manifest.source}, not on this machine")
        if row.name.startswith("/") or ".." in row.name.split("/"):
            raise UserError(f"{row.name!r} of {self.folder} leads out of the store's source folder: it is not opened")
        return folder / row.name

    def image(self, row: Row) -> Image.Image:
        """The crop that was embedded, from its file: a photo, a box in one or in a video's frame, or a tar's member.

        Raises:
            UserError: it is gone or cannot be read any more, or `path` refuses it.
        """
        from mgn_deploy.gallery.crops import row_crop  # which needs what reads every kind of file

        try:
            return row_crop(self, row)
        except UnreadableImage as problem:
            raise UserError(f"{row.name!r} of {self.folder} cannot be read: {problem}") from None

    def identities(self) -> np.ndarray:
        """int64 `[len(store)]`; UNKNOWN (-2) where nobody said it."""
        return np.array([UNKNOWN if row.identity is None else row.identity for row in self.rows], np.int64)

    def cameras(self) -> np.ndarray:
        """int64 `[len(store)]`; UNKNOWN (-2) where nobody said it."""
        return np.array([UNKNOWN if row.camera is None else row.camera for row in self.rows], np.int64)

    def to_pandas(self) -> pd.DataFrame:
        """A frame with one line an image: first those of `embeddings()`, in its order, then the failures.

        Columns: path (the image's name, as `store[name]` takes it), status (ok or failed), error, identity and camera
        (missing where nobody said them), size in bytes, mtime (UTC, in ns), and of videos frame, time_s and track.

        Raises:
            CannotRun: pandas is not installed.
        """
        require("pandas", "pandas", "to_pandas makes a frame of pandas")
        import pandas as pd

        # Texts as objects: pandas' own strings cannot hold a name that is not UTF-8.
        types = dict.fromkeys(("name", "status", "error"), "object")
        types |= dict.fromkeys(("identity", "camera", "size", "mtime_ns", "frame"), "Int64")
        types |= {"time_s": "Float64", "track": "Int64"}
        rows = [*self.rows, *self.failures]
        frame = pd.DataFrame(
            {name: pd.Series([getattr(row, name) for row in rows], dtype=kind) for name, kind in types.items()}
        )
        frame["mtime_ns"] = pd.to_datetime(frame["mtime_ns"], unit="ns", utc=True)
        return frame.rename(columns={"name": "path", "mtime_ns": "mtime"})

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {row.name: index for index, row in enumerate(self.rows)}

    def _index(self, name: str) -> int:
        if not isinstance(name, str):
            raise TypeError(f"a store is indexed by an image's name, not {name!r}; by number: .rows, .embeddings()")
        if name not in self._indices:
            raise KeyError(f"{self.folder} holds no embedding of {name!r}")
        return self._indices[name]
