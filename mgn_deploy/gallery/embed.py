"""A folder of images -> an embedding store: decoded while the engine runs, resumable, with every bad file named."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from mgn_deploy.datasets.market1501 import parse_name
from mgn_deploy.embedder import Embedder, check_batch_size
from mgn_deploy.errors import GateFailed, UnreadableImage
from mgn_deploy.gallery.store import Row, StoreManifest, StoreWriter
from mgn_deploy.images.decode import PREPROCESSING, read_crop
from mgn_deploy.images.listing import ImageFile, list_images
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.progress import Progress

# Rows committed at once: what a power cut can cost, and what a store of a million images is divided into.
SHARD_ROWS = 1024

Decoded = tuple[ImageFile, np.ndarray | str]


@dataclass
class GalleryReport:
    """What one run did. `failed` are (name, reason) of this run's bad files; `unchanged` were in the store already."""

    embedded: int = 0
    unchanged: int = 0
    gone: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def embed_folder(
    folder: str | os.PathLike[str],
    store: str | os.PathLike[str],
    embedder: Embedder,
    *,
    batch_size: int = 8,
    dtype: Literal["float32", "float16"] = "float32",
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
        progress: called with the files done and to do.

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
    with StoreWriter(store, manifest) as writer:
        report.gone = len(writer.known.keys() - {file.name for file in files})
        # Files never seen come first and in shards of their own, so that a run that was killed and is run again divides
        # them as one that was not.
        fresh = [file for file in files if file.name not in writer.known]
        again = [file for file in files if file.name in writer.known and not _is_done(file, writer.known[file.name])]
        report.unchanged = len(files) - len(fresh) - len(again)
        shards = [part[at : at + SHARD_ROWS] for part in (fresh, again) for at in range(0, len(part), SHARD_ROWS)]
        decoded = in_order(lambda file: _decode(file, embedder.height, embedder.width), fresh + again)
        done = 0

        def update(rows: int) -> None:
            if progress:
                progress("embedding", done + rows, len(fresh) + len(again))

        for shard in shards:
            _embed_shard(decoded, len(shard), embedder, batch_size, writer, report, max_failures, update)
            done += len(shard)
    if report.failed and not report.embedded and not report.unchanged:
        name, reason = report.failed[0]
        raise GateFailed(
            f"not one of the {len(report.failed)} images of {str(folder)!r} could be read; "
            f"the first, {name!r}: {reason}"
        )
    return report


def _is_done(file: ImageFile, row: Row) -> bool:
    return row.error is None and (row.size, row.mtime_ns) == (file.size, file.mtime_ns)


def _decode(file: ImageFile, height: int, width: int) -> Decoded:
    if file.problem:
        return file, file.problem
    try:
        return file, read_crop(file.path, height, width)
    except UnreadableImage as error:
        return file, str(error)


def _embed_shard(
    decoded: Iterator[Decoded],
    count: int,
    embedder: Embedder,
    batch_size: int,
    writer: StoreWriter,
    report: GalleryReport,
    max_failures: int | None,
    progress: Callable[[int], None],
) -> None:
    """Embed the next `count` files and commit them as one shard; fewer, if interrupted."""
    rows: list[Row] = []
    embeddings = np.full((count, embedder.dim), np.nan, np.float32)
    batch: list[np.ndarray] = []
    places: list[int] = []  # rows of the batch that is being filled
    on_their_way = deque[list[int]]()  # those of the batches that the backend has

    def whole() -> int:
        """Rows before this one are complete."""
        return min([row for first in [*on_their_way, places] for row in first[:1]], default=len(rows))

    def too_many() -> bool:
        return max_failures is not None and len(report.failed) > max_failures

    def full_batch() -> np.ndarray:
        # An engine may round differently at another batch size, and a resumed run must not: copies fill the last batch.
        images = np.stack(batch + [batch[-1]] * (batch_size - len(batch)))
        on_their_way.append(places.copy())
        batch.clear()
        places.clear()
        return images

    def batches() -> Iterator[np.ndarray]:
        for _ in range(count):
            file, pixels = next(decoded)
            if isinstance(pixels, str):
                report.failed.append((file.name, pixels))
            else:
                batch.append(pixels)
                places.append(len(rows))
            rows.append(_row(file, pixels if isinstance(pixels, str) else None))
            if len(batch) == batch_size:
                yield full_batch()
            progress(whole())
            if too_many():
                return
        if batch:
            yield full_batch()

    try:
        for found in embedder.backend.stream(batches()):
            own = on_their_way[0]
            embeddings[own] = found[: len(own)]
            on_their_way.popleft()  # now: Ctrl-C between the two must not count rows that are not there
            report.embedded += len(own)
        progress(whole())
        if too_many():
            name, reason = report.failed[-1]
            raise GateFailed(f"more than {max_failures} images cannot be read; the last, {name!r}: {reason}")
    finally:
        _commit_new(writer, rows[: whole()], embeddings[: whole()])


def _commit_new(writer: StoreWriter, rows: Sequence[Row], embeddings: np.ndarray) -> None:
    """Commit the rows that say something new: a file that fails again as before is in the store already."""
    new = [index for index, row in enumerate(rows) if row.error is None or row != writer.known.get(row.name)]
    if new:
        writer.commit([rows[index] for index in new], embeddings[new])


def _row(file: ImageFile, error: str | None) -> Row:
    label = parse_name(os.path.basename(file.name))
    if error is not None:
        error = error.encode("utf-8", "backslashreplace").decode()  # as Parquet keeps it
    identity, camera = label or (None, None)
    return Row(file.name, file.size, file.mtime_ns, error, identity, camera)
