"""Tracklets -> one embedding a track: the mean of its best images, which are those that are large and sharp.

Sharpness is the variance of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR
2000), of the grey crop at one size for all, so that it does not measure size a second time. An image's rank in its
track is the sum of its ranks by area and by sharpness; the K with the least are taken.
"""

from __future__ import annotations

import io
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mgn_deploy.errors import UserError
from mgn_deploy.files import write_bytes
from mgn_deploy.gallery.crops import crops, sequence_of
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.images.resize import resized
from mgn_deploy.progress import Progress

TAKEN = "taken.parquet"  # beside a store of tracks: the images of each
BEST = 8
_GREY_SIZE = (64, 128)  # pixels, width and height
T = TypeVar("T")
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class PooledTracks:
    """What `pool_tracks` did: the tracks, the images that have one, those that were taken, and those not read again."""

    tracks: int
    images: int
    taken: int
    unreadable: int


def pool_tracks(
    store: str | os.PathLike[str], out: str | os.PathLike[str], *, best: int = BEST, progress: Progress | None = None
) -> PooledTracks:
    """Write a store with one row a track of another store: the mean of the unit embeddings of its best images, as unit.

    A track's row is that of its best image, with the identity and camera that all images of the track agree on. So a
    page shows that image, and `search` and `identify` take the store as any other. `taken.parquet` beside its manifest
    has the columns track_row, image, rank (from 1), area in pixels and sharpness. Images that cannot be read again come
    last. Tracks of different videos, or of photos in different folders, are different tracks. A folder that holds just
    these rows stays as it is: a run that was killed after its last step may be started again.

    Args:
        store: with tracks, as `embed --boxes` makes it.
        out: a new folder.
        best: K, the most images that are taken of a track.
        progress: called with the images that were measured and are to be.

    Raises:
        UserError: the store has no tracks, its images are not on this machine, or `out` is in use or holds
            other rows.
    """
    if best < 1:
        raise UserError(f"the best {best} images of a track are none: take 1 or more")
    opened = Store.open(store)
    tracks: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, row in enumerate(opened.rows):
        if row.track is not None:
            tracks[sequence_of(row), row.track].append(index)
    if not tracks:
        raise UserError(
            f"{store} has no tracks: `mgn-deploy embed --video CLIP --boxes` with a tracker's boxes gives them"
        )
    rows = opened.rows
    images = [index for indices in tracks.values() for index in indices]
    images.sort(key=lambda index: (sequence_of(rows[index]), rows[index].frame or 0, index))
    area, sharpness = _measure(opened, images, progress)
    unreadable = int((sharpness[images] < 0).sum())
    if unreadable:
        _log.warning(
            f"{unreadable:,} of {len(images):,} images cannot be read again: others of their tracks come first"
        )
    taken = [_best(np.array(indices), area, sharpness)[:best] for indices in tracks.values()]
    embeddings = opened.embeddings()
    pooled = np.stack([_mean(embeddings[some]) for some in taken])
    made = opened.manifest
    manifest = made.model_copy(
        # Another preprocessing, so that no image is added by mistake.
        update={
            "shards": (),
            "schema_version": 2,
            "preprocessing": f"{made.preprocessing}, mean of the best {best} of a track",
        }
    )
    with StoreWriter(out, manifest) as writer:
        pooled_rows = [
            _row(rows[some[0]], [rows[index] for index in indices])
            for some, indices in zip(taken, tracks.values(), strict=True)
        ]
        if not writer.manifest.shards:
            write_bytes(Path(out) / TAKEN, _table(rows, taken, area, sharpness))
            writer.add(pooled_rows, pooled)
        elif list(writer.known.values()) != pooled_rows:
            raise UserError(f"{out} holds other rows already: pool tracks into a new folder")
    return PooledTracks(len(tracks), len(images), sum(map(len, taken)), unreadable)


def quality(image: Image.Image) -> tuple[int, float]:
    """The area of a crop in pixels, and its sharpness: the variance of the Laplacian of its grey at 64x128 pixels."""
    grey = np.asarray(resized(image.convert("L"), _GREY_SIZE, Image.Resampling.BILINEAR), np.float32)
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return image.width * image.height, float(laplacian.var())


def _measure(store: Store, images: Sequence[int], progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    """Area and sharpness of the store's rows, as far as they are among `images` and can be read; else 0 and -1."""
    area, sharpness = np.zeros(len(store), np.int64), np.full(len(store), -1.0)
    found = zip(images, crops(store, [store.rows[index] for index in images]), strict=True)
    for done, (index, (_, image)) in enumerate(found, start=1):
        if not isinstance(image, str):
            area[index], sharpness[index] = quality(image)
        if progress:
            progress("measuring", done, len(images))
    return area, sharpness


def _best(images: np.ndarray, area: np.ndarray, sharpness: np.ndarray) -> np.ndarray:
    """The images of a track, given in ascending order, best first; of equals the earlier one."""
    larger, sharper = (np.searchsorted(np.sort(-values), -values) for values in (area[images], sharpness[images]))
    return images[np.argsort(larger + sharper, kind="stable")]


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean of unit rows `[n, dim]` as a unit float32 `[dim]`."""
    rows = rows.astype(np.float32)
    mean = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _row(first: Row, rows: Sequence[Row]) -> Row:
    return replace(
        first, identity=_agreed([row.identity for row in rows]), camera=_agreed([row.camera for row in rows])
    )


def _agreed(values: Sequence[T]) -> T | None:
    return values[0] if len(set(values)) == 1 else None


def _table(rows: Sequence[Row], taken: Sequence[np.ndarray], area: np.ndarray, sharpness: np.ndarray) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = np.concatenate(taken)
    table = {
        "track_row": [rows[some[0]].path for some in taken for _ in some],
        "image": [rows[index].path for index in images],
        "rank": pa.array([rank for some in taken for rank in range(1, len(some) + 1)], pa.int32()),
        "area": area[images],
        "sharpness": pa.array(sharpness[images], mask=sharpness[images] < 0),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getvalue()
