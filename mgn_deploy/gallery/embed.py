"""A folder of images -> an embedding store: decoded while the engine runs, resumable, with every bad file named."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.choices import Dtype
from mgn_deploy.datasets.market1501 import parse_name
from mgn_deploy.embedder import Embedder, check_batch_size
from mgn_deploy.errors import GateFailed, UnreadableImage
from mgn_deploy.gallery.shards import Row, StoreManifest
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.images.decode import PREPROCESSING, read_crop
from mgn_deploy.images.listing import ImageFile, list_images
from mgn_deploy.images.prefetch import batched, in_order
from mgn_deploy.progress import Progress

# Rows committed at once: what a power cut can cost, and what a store of a million images is divided into.
SHARD_ROWS = 1024
LOGGED_FAILURES = 10
_log = logging.getLogger("mgn_deploy")

# An image's row and its crop, uint8 `[height, width, 3]`, or None where the row has an error.
Decoded = tuple[Row, np.ndarray | None]


@dataclass
class GalleryReport:
    """What one run did.

    Attributes:
        embedded: images that it embedded.
        unchanged: images that were in the store already.
        gone: images of the store that are no longer in the folder; their rows stay.
        failed: name and reason of each file that it could not read.
        seconds: how long it took.
    """

    embedded: int = 0
    unchanged: int = 0
    gone: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; of the files that failed their number."""
        return {
            **vars(self),
            "failed": len(self.failed),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 2),
        }


def embed_folder(
    folder: str | os.PathLike[str],
    store: str | os.PathLike[str],
    embedder: Embedder,
    *,
    batch_size: int = 8,
    dtype: Dtype = "float32",
    max_failures: int | None = None,
    progress: Progress | None = None,
) -> GalleryReport:
    """Embed every image below `folder` that `store` does not hold yet.

    A file is in the store already when its name, size and mtime are. Files that failed before are tried again. Rows are
    committed shard by shard; on Ctrl-C what was embedded is committed before the exception goes on.

    Args:
        folder: searched recursively; the order is that of the names' bytes.
        store: a new folder or the store of an earlier run over the same folder with the same bundle and backend.
        embedder: decides the bundle, and is called with `batch_size` images at a time.
        dtype: of the stored embeddings.
        max_failures: stop after more bad files than this; None: never.
        progress: called after each batch with the files done and to do.

    Raises:
        UserError: no such folder, no image in it, a store of something else, a store in use, a full disk.
        GateFailed: more than `max_failures` bad files, or not one good one. What was embedded is committed.
    """
    check_batch_size(batch_size)
    folder = Path(folder)
    files = list_images(folder)
    manifest = StoreManifest(
        bundle_id=embedder.bundle.id,
        backend=embedder.backend.name,
        preprocessing=PREPROCESSING,
        dim=embedder.dim,
        dtype=dtype,
        source=Path(os.path.abspath(folder)).as_uri(),
    )
    report = GalleryReport()
    start = time.monotonic()
    with StoreWriter(store, manifest) as writer:
        report.gone = len(writer.known.keys() - {file.name for file in files})
        # Files never seen come first and in shards of their own, so that a run that was killed and is run again divides
        # them as one that was not.
        fresh = [file for file in files if file.name not in writer.known]
        again = [file for file in files if file.name in writer.known and not _is_done(file, writer.known[file.name])]
        total = len(fresh) + len(again)
        report.unchanged = len(files) - total
        decoded = in_order(lambda file: _decode(file, embedder.height, embedder.width), fresh + again)
        images = _until_too_many_fail(decoded, report, max_failures)
        done = 0
        for count in [len(shard) for part in (fresh, again) for shard in batched(part, SHARD_ROWS)]:
            shard = _Shard(count, embedder.dim, batch_size)
            try:
                for embeddings in embedder.backend.stream(shard.batches(islice(images, count))):
                    report.embedded += shard.add(embeddings)
                    if progress:
                        progress("embedding", done + shard.complete(), total)
            finally:
                shard.commit(writer)
            done += len(shard.rows)
            if progress:
                progress("embedding", done, total)
            if max_failures is not None and len(report.failed) > max_failures:
                name, reason = report.failed[-1]
                raise GateFailed(f"more than {max_failures} images cannot be read; the last, {name!r}: {reason}")
    if report.failed and not report.embedded and not report.unchanged:
        name, reason = report.failed[0]
        raise GateFailed(
            f"not one of the {len(report.failed)} images of {str(folder)!r} could be read; "
            f"the first, {name!r}: {reason}"
        )
    report.seconds = time.monotonic() - start
    _log_losses(report, folder)
    return report


def _log_losses(report: GalleryReport, folder: Path) -> None:
    for name, reason in report.failed[:LOGGED_FAILURES]:
        _log.warning(f"cannot be read: {name!r}: {reason}")
    if len(report.failed) > LOGGED_FAILURES:
        more = len(report.failed) - LOGGED_FAILURES
        _log.warning(f"... and {more} more, in the store's Parquet with their reasons")
    if report.gone:
        _log.warning(f"{report.gone} images of the store are no longer in {str(folder)!r}; they stay in the store")


def _is_done(file: ImageFile, row: Row) -> bool:
    return row.error is None and (row.size, row.mtime_ns) == (file.size, file.mtime_ns)


def _decode(file: ImageFile, height: int, width: int) -> Decoded:
    pixels, error = None, file.problem
    if error is None:
        try:
            pixels = read_crop(file.path, height, width)
        except UnreadableImage as problem:
            error = str(problem)
    if error is not None:
        error = error.encode("utf-8", "backslashreplace").decode()  # as Parquet keeps it
    identity, camera = parse_name(os.path.basename(file.name)) or (None, None)
    return Row(file.name, file.size, file.mtime_ns, error, identity, camera), pixels


def _until_too_many_fail(
    images: Iterable[Decoded], report: GalleryReport, max_failures: int | None
) -> Iterator[Decoded]:
    """The images, those that failed noted in the report; no more of them after one failure too many."""
    for row, pixels in images:
        if row.error is not None:
            report.failed.append((row.name, row.error))
        yield row, pixels
        if max_failures is not None and len(report.failed) > max_failures:
            return


class _Shard:
    """The rows of one shard and their embeddings, while a backend that may ask for batches ahead makes them."""

    def __init__(self, count: int, dim: int, batch_size: int) -> None:
        self.rows: list[Row] = []
        self._embeddings = np.full((count, dim), np.nan, np.float32)
        self._batch_size = batch_size
        self._crops: list[np.ndarray] = []  # of the batch that is being filled
        self._filling: list[int] = []  # their rows
        self._in_flight = deque[list[int]]()  # rows of each batch that the backend has

    def batches(self, images: Iterable[Decoded]) -> Iterator[np.ndarray]:
        """The crops of `images` in batches `[batch_size, height, width, 3]`; each image becomes a row."""
        for row, pixels in images:
            if pixels is not None:
                self._crops.append(pixels)
                self._filling.append(len(self.rows))
            self.rows.append(row)
            if len(self._crops) == self._batch_size:
                yield self._full_batch()
        if self._crops:
            yield self._full_batch()

    def _full_batch(self) -> np.ndarray:
        # An engine may round differently at another batch size, and a resumed run must not: copies fill the last batch.
        batch = np.stack(self._crops + [self._crops[-1]] * (self._batch_size - len(self._crops)))
        self._in_flight.append(self._filling)
        self._filling = []
        self._crops.clear()
        return batch

    def add(self, embeddings: np.ndarray) -> int:
        """Take the embeddings of the earliest batch that the backend has; how many rows they are."""
        rows = self._in_flight[0]
        self._embeddings[rows] = embeddings[: len(rows)]
        self._in_flight.popleft()  # now: Ctrl-C between the two must not count rows that are not there
        return len(rows)

    def complete(self) -> int:
        """How many rows, from the first on, are embedded or failed."""
        return min([rows[0] for rows in (*self._in_flight, self._filling) if rows], default=len(self.rows))

    def commit(self, writer: StoreWriter) -> None:
        """Commit the complete rows that say something new: a file that fails as before is in the store already."""
        rows = self.rows[: self.complete()]
        new = [index for index, row in enumerate(rows) if row.error is None or row != writer.known.get(row.name)]
        if new:
            writer.commit([rows[index] for index in new], self._embeddings[new])
