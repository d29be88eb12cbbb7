"""The store behind the service: it follows a store that grows, searches it, and shows its images as thumbnails."""

from __future__ import annotations

import base64
import binascii
import io
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.shards import Row, shard_numbers
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.images.listing import list_images
from mgn_deploy.retrieval.distance import top_k
from mgn_deploy.retrieval.search import check_same_bundle

THUMBNAIL_SIDE = 320  # pixels: twice what the page shows, for dense screens
JPEG_QUALITY = 85
REFRESH_SECONDS = 1
COUNT_SECONDS = 60  # between two listings of the folder that is being embedded


_log = logging.getLogger("mgn_deploy")


class NotShown(Exception):
    """A gallery image that has no thumbnail: not in the store, outside of its source, gone or unreadable."""


@dataclass(frozen=True)
class Hit:
    """A gallery image that was found.

    Attributes:
        row: of the store.
        similarity: cosine.
        key: of its thumbnail.
    """

    row: Row
    similarity: float
    key: str


class Gallery:
    """A store opened for a long time. Threads may use it together.

    Args:
        folder: the store; it may grow meanwhile, and hold no image yet.
        bundle_id: of the bundle that embeds the queries.

    Raises:
        UserError: no store there, or another bundle's.
    """

    def __init__(self, folder: str | os.PathLike[str], bundle_id: str) -> None:
        store = Store.open(folder)
        check_same_bundle(bundle_id, store)
        self._opened = store, store.embeddings(), shard_numbers(store.folder)
        self._refreshing = threading.Lock()
        self._refreshed = time.monotonic()
        self._counting = threading.Lock()
        self._found: int | None = None
        self._counted = -float(COUNT_SECONDS)
        self._counted_shards: list[int] | None = None

    @property
    def store(self) -> Store:
        """As it was when it was looked at last."""
        return self._opened[0]

    def refresh(self) -> None:
        """See what was committed to the store since; looks at the disk every `REFRESH_SECONDS` at most.

        A store that became unreadable is logged, and the service goes on with what it has.
        """
        if not self._refreshing.acquire(blocking=False):
            return  # another thread does
        try:
            if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
                self._refreshed = time.monotonic()
                self._look()
        except UserError as error:
            _log.warning(f"the gallery stays as it was: {error}")
        finally:
            self._refreshing.release()

    def _look(self) -> None:
        folder = self.store.folder
        shards = shard_numbers(folder)
        if shards != self._opened[2]:
            store = Store.open(folder)
            check_same_bundle(self.store.manifest.bundle_id, store)
            self._opened = store, store.embeddings(), shards

    def search(
        self,
        query: np.ndarray,
        k: int,
        *,
        cameras: Sequence[int] | None = None,
    ) -> list[list[Hit]]:
        """The k nearest images of each query `[n, dim]`, best first.

        Args:
            query: unit rows.
            k: most images a query.
            cameras: of these alone, where given.

        Raises:
            UserError: the store holds no image yet.
        """
        store, embeddings, _ = self._opened
        if not len(store):
            raise UserError(f"{store.folder.name} holds no image yet: embed some first")
        others = None if cameras is None else ~np.isin(store.cameras(), cameras)

        def excluded(rows: slice) -> np.ndarray:
            return np.tile(others, (len(query[rows]), 1))

        indices, similarities = top_k(query, embeddings, k, excluded=None if others is None else excluded)
        return [
            [
                Hit(store.rows[i], float(s), thumbnail_key(store.rows[i].name))
                for i, s in zip(*ranked, strict=True)
                if i >= 0
            ]
            for ranked in zip(indices, similarities, strict=True)
        ]

    def progress(self) -> dict[str, Any]:
        """How far the store is: `images`, `failures`, and `found`, the images in its source folder (None where the
        source is no folder on this machine); and its `cameras`, each with its number of images."""
        self.refresh()
        store = self.store
        cameras, counts = np.unique(store.cameras(), return_counts=True)
        return {
            "images": len(store),
            "failures": len(store.failures),
            "found": self._count_source(),
            "cameras": {int(camera): int(count) for camera, count in zip(cameras, counts, strict=True) if camera >= 0},
        }

    def _count_source(self) -> int | None:
        shards = self._opened[2]
        with self._counting:
            if shards != self._counted_shards and time.monotonic() - self._counted >= COUNT_SECONDS:
                try:
                    self._found = len(list_images(self._source()))
                except UserError:  # it has moved, or was never a folder
                    self._found = None
                self._counted, self._counted_shards = time.monotonic(), shards
            return self._found

    def _source(self) -> Path:
        return self.store.path(Row("", None, None, None, None, None))

    def tag(self, key: str) -> str:
        """What changes with a thumbnail, as HTTP's ETag; raises NotShown where the store has no such image."""
        row = self.store.row(self._name(key))
        return f'"{row.size}-{row.mtime_ns}"'

    def thumbnail(self, key: str) -> bytes:
        """A gallery image as a small JPEG, re-encoded without its metadata.

        Raises:
            NotShown: the store has no such image, its file is not below the store's source (by `..`, an absolute name
                or a link), is gone, or cannot be read.
        """
        name = self._name(key)
        source = os.path.realpath(self._source())
        path = os.path.realpath(os.path.join(source, name))
        if os.path.isabs(name) or ".." in name.split("/") or os.path.commonpath([source, path]) != source:
            raise NotShown("the image lies outside of the gallery's source")
        try:
            image = load_rgb(path)
        except UnreadableImage as reason:
            raise NotShown(f"the image cannot be shown: {reason}") from None
        return encode_thumbnail(image)

    def _name(self, key: str) -> str:
        try:
            name = os.fsdecode(base64.urlsafe_b64decode(key + "=" * (-len(key) % 4)))
        except (binascii.Error, ValueError):
            name = ""
        if name not in self.store:
            raise NotShown("no such image in the gallery")
        return name


def encode_thumbnail(image: Image.Image) -> bytes:
    """A JPEG of at most `THUMBNAIL_SIDE` pixels a side, without metadata."""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.info.clear()  # Pillow would carry a JPEG comment over
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def thumbnail_key(name: str) -> str:
    """A row's name as part of a URL, whatever its bytes are."""
    return base64.urlsafe_b64encode(os.fsencode(name)).decode().rstrip("=")
