"""The store behind the service: it follows a store that grows, searches it, and shows its images as thumbnails."""

from __future__ import annotations

import base64
import binascii
import logging
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.crops import row_crop
from mgn_deploy.gallery.manifest import StoreManifest, read_manifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.calibration import Calibration
from mgn_deploy.identity.ranked import estimate_prior
from mgn_deploy.images.listing import list_images
from mgn_deploy.report.pages import JPEG_QUALITY, shrunk_jpeg
from mgn_deploy.retrieval.nearest import top_k
from mgn_deploy.retrieval.search import check_same_bundle

THUMBNAIL_SIDE = 320  # pixels: twice what the page shows, for dense screens
REFRESH_SECONDS = 1
BLOCK_ROWS = 16384  # of 2048 numbers, 128 MiB
COUNT_SECONDS = 60  # between two listings of the folder that is being embedded


_SOURCE = Row("", None, None, None, None, None)  # whose path is the source itself
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


@dataclass(frozen=True)
class _Opened:
    """A store at one moment, and what is asked of it again and again.

    Attributes:
        store: as it was.
        embeddings: `[n, dim]`.
        cameras: int64 `[n]`.
        times: float64 `[n]`, seconds; NaN where an image has none.
    """

    store: Store
    embeddings: np.ndarray
    cameras: np.ndarray
    times: np.ndarray

    @classmethod
    def of(cls, store: Store, before: _Opened | None = None) -> _Opened:
        """Of a store; of one that has grown since `before`, only the new embeddings are read."""
        times = np.array([np.nan if row.time_s is None else row.time_s for row in store], np.float64)
        if before is None or not len(before.store) or store.rows[: len(before.store)] != before.store.rows:
            embeddings = store.embeddings()
        else:
            new = store.take(np.arange(len(before.store), len(store)))
            embeddings = np.concatenate([before.embeddings, new]) if len(new) else before.embeddings
        return cls(store, embeddings, store.cameras(), times)


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
        self._opened = _Opened.of(store)
        self._refreshing = threading.Lock()
        self._refreshed = time.monotonic()
        self._prior: tuple[_Opened, float] | None = None
        self._counting = threading.Lock()
        self._found: int | None = None
        self._counted = -float(COUNT_SECONDS)
        self._counted_for: StoreManifest | None = None

    @property
    def store(self) -> Store:
        """As it was when it was looked at last."""
        return self._opened.store

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
        before = self._opened
        if read_manifest(before.store.folder) != before.store.manifest:
            store = before.store.reopened()
            check_same_bundle(before.store.manifest.bundle_id, store)
            self._opened = _Opened.of(store, before)

    def search(
        self,
        query: np.ndarray,
        k: int,
        *,
        cameras: Sequence[int] | None = None,
        after: float | None = None,
        before: float | None = None,
    ) -> list[list[Hit]]:
        """The k nearest images of each query `[n, dim]`, best first.

        Args:
            query: unit rows.
            k: most images a query.
            cameras: of these alone, where given.
            after, before: from the first time on and before the second, in seconds from a video's start, where given;
                images that have no time are then left out.

        Raises:
            UserError: the store holds no image yet, or `after` or `before` is not a finite number.
        """
        opened = self._opened
        store, embeddings = opened.store, opened.embeddings
        if not len(store):
            raise UserError(f"{store.folder.name} holds no image yet: embed some first")
        wanted = _wanted(opened, cameras, after, before)
        indices, similarities = (
            top_k(query, embeddings, k) if wanted is None else _top_k_of(query, embeddings, wanted, k)
        )
        return [
            [
                Hit(store.rows[i], min(float(s), 1.0), thumbnail_key(store.rows[i].name))
                for i, s in zip(*ranked, strict=True)
                if i >= 0
            ]
            for ranked in zip(indices, similarities, strict=True)
        ]

    def unfit_filter(self, cameras: Sequence[int] | None, after: float | None, before: float | None) -> str | None:
        """What to say of a filter by what no image of the store has; None where there is nothing to say."""
        opened = self._opened
        if cameras is not None and (opened.cameras < 0).all():
            return "no image of the gallery has a camera: `embed --labels` gives cameras"
        if (after is not None or before is not None) and np.isnan(opened.times).all():
            return "no image of the gallery has a time: those of a video have one"
        return None

    def prior(self, calibration: Calibration) -> float:
        """The share of pairs of one person, estimated once for each state of the store (`estimate_prior`)."""
        opened, known = self._opened, self._prior
        if known is None or known[0] is not opened:
            known = self._prior = opened, estimate_prior(opened.embeddings, calibration)
        return known[1]

    def progress(self) -> dict[str, Any]:
        """How far the store is: `images`, `failures`, and `found`, the images in its source folder (None where the
        source is no folder on this machine); its `cameras`, each with its number of images; and `seconds`, the first
        and the last time of its images (None where they have none)."""
        self.refresh()
        opened = self._opened
        cameras, counts = np.unique(opened.cameras, return_counts=True)
        times = opened.times[~np.isnan(opened.times)]
        return {
            "images": len(opened.store),
            "failures": len(opened.store.failures),
            "found": self._count_source(),
            "cameras": {int(camera): int(count) for camera, count in zip(cameras, counts, strict=True) if camera >= 0},
            "seconds": (float(times.min()), float(times.max())) if len(times) else None,
        }

    def _count_source(self) -> int | None:
        store = self.store
        with self._counting:
            if store.manifest != self._counted_for and time.monotonic() - self._counted >= COUNT_SECONDS:
                try:
                    self._found = len(list_images(store.path(_SOURCE)))
                except UserError:  # it has moved, or was never a folder
                    self._found = None
                self._counted, self._counted_for = time.monotonic(), store.manifest
            return self._found

    def tag(self, key: str) -> str:
        """What changes with a thumbnail, as HTTP's ETag; raises NotShown where the store has no such image."""
        row = _row(self.store, key)
        return f'"{zlib.crc32(repr((row.size, row.mtime_ns, row.sha256, row.box)).encode()):08x}"'

    def thumbnail(self, key: str) -> bytes:
        """A gallery image (a photo, a box in one or in a video's frame, a member of a tar or bucket) as a small JPEG,
        re-encoded without its metadata.

        Raises:
            NotShown: the store has no such image, its file is not below the store's source (by `..`, an absolute name
                or a link), is gone, or cannot be read.
        """
        store = self.store  # one of them: another thread may refresh it
        row = _row(store, key)
        try:
            if store.manifest.source.startswith("file:"):
                source = os.path.realpath(store.path(_SOURCE))
                path = os.path.realpath(store.path(replace(row, name=row.file)))
                if os.path.commonpath([source, path]) != source:
                    raise NotShown("the image lies outside of the gallery's source")
            return shrunk_jpeg(row_crop(store, row), THUMBNAIL_SIDE, JPEG_QUALITY)
        except (UnreadableImage, UserError) as reason:
            raise NotShown(f"the image cannot be shown: {reason}") from None


def _row(store: Store, key: str) -> Row:
    try:
        name = os.fsdecode(base64.urlsafe_b64decode(key + "=" * (-len(key) % 4)))
    except (binascii.Error, ValueError):
        name = ""
    if name not in store:
        raise NotShown("no such image in the gallery")
    return store.row(name)


def _wanted(
    opened: _Opened, cameras: Sequence[int] | None, after: float | None, before: float | None
) -> np.ndarray | None:
    """The rows that the filters let through, int64, ascending; None without a filter."""
    if cameras is None and after is None and before is None:
        return None
    wanted = np.ones(len(opened.store), bool)
    if cameras is not None:
        wanted &= np.isin(opened.cameras, cameras)
    for name, time_s in (("after", after), ("before", before)):
        if time_s is not None and not np.isfinite(time_s):
            raise UserError(f"{name} must be a finite number of seconds, not {time_s}")
    if after is not None:
        wanted &= opened.times >= after  # which NaN is not
    if before is not None:
        wanted &= opened.times < before
    return np.flatnonzero(wanted)


def _top_k_of(query: np.ndarray, gallery: np.ndarray, wanted: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` among some rows of the gallery, copied `BLOCK_ROWS` at a time."""
    indices = np.empty((len(query), 0), np.int64)
    similarities = np.empty((len(query), 0), np.float32)
    for start in range(0, len(wanted), BLOCK_ROWS):
        rows = wanted[start : start + BLOCK_ROWS]
        found, values = top_k(query, gallery[rows], k)
        values = np.concatenate([similarities, values], axis=1)
        found = np.concatenate([indices, rows[found]], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]  # equal similarities by index, as `top_k` does
        similarities, indices = np.take_along_axis(values, order, axis=1), np.take_along_axis(found, order, axis=1)
    return indices, similarities


def thumbnail_key(name: str) -> str:
    """A row's name as part of a URL, whatever its bytes are."""
    return base64.urlsafe_b64encode(os.fsencode(name)).decode().rstrip("=")
