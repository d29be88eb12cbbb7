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
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mgn_deploy.errors import UserError
from mgn_deploy.files import printable, write_bytes
from mgn_deploy.gallery.crops import crops, sequence_of
from mgn_deploy.gallery.shards import Row
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return vars(self)


@dataclass(frozen=True)
class _Measured:
    index: int  # among the store's rows
    area: int = 0
    sharpness: float = -1.0


def pool_tracks(
    store: str | os.PathLike[str], out: str | os.PathLike[str], *, best: int = BEST, progress: Progress | None = None
) -> PooledTracks:
    """Write a store with one row a track of another store: the mean of the unit embeddings of its best images, as unit.

    A track's row is that of its best image, with the identity and camera that all images of the track agree on. So a
    page shows that image, and `search` and `identify` take the store as any other. `taken.parquet` beside its manifest
    has the columns track_row, image, rank (from 1), area in pixels and sharpness. Images that cannot be read again come
    last. Tracks of different videos, or of photos in different folders, are different tracks.

    Args:
        store: with tracks, as `embed --boxes` makes it.
        out: a new folder.
        best: K, the most images that are taken of a track.
        progress: called with the images that were measured and are to be.

    Raises:
        UserError: the store has no tracks, its images are not on this machine, or `out` is in use.
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
    measured = _measure(opened, progress)
    taken = {track: _best([measured[index] for index in indices], best) for track, indices in tracks.items()}
    unreadable = sum(one.sharpness < 0 for one in measured.values())
    if unreadable:
        _log.warning(
            f"{unreadable:,} of {len(measured):,} images cannot be read again: others of their tracks come first"
        )
    rows, embeddings = opened.rows, opened.embeddings()
    pooled = np.stack([_mean(embeddings[[one.index for one in images]]) for images in taken.values()])
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
        if writer.manifest.shards:
            raise UserError(f"{out} holds rows already: pool tracks into a new folder")
        write_bytes(Path(out) / TAKEN, _table(rows, taken.values()))
        writer.add([_row(rows, taken[track], tracks[track]) for track in tracks], pooled)
    count = sum(map(len, taken.values()))
    return PooledTracks(len(tracks), len(measured), count, unreadable)


def quality(image: Image.Image) -> tuple[int, float]:
    """The area of a crop in pixels, and its sharpness: the variance of the Laplacian of its grey at 64x128 pixels."""
    grey = np.asarray(resized(image.convert("L"), _GREY_SIZE, Image.Resampling.BILINEAR), np.float32)
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return image.width * image.height, float(laplacian.var())


def _measure(store: Store, progress: Progress | None) -> dict[int, _Measured]:
    """Each image that has a track, measured, by its index."""
    indices = [index for index, row in enumerate(store.rows) if row.track is not None]
    indices.sort(key=lambda index: (sequence_of(store.rows[index]), store.rows[index].frame or 0, index))
    measured = {}
    for done, (index, (_, image)) in enumerate(
        zip(indices, crops(store, [store.rows[index] for index in indices]), strict=True), start=1
    ):
        measured[index] = _Measured(index) if isinstance(image, str) else _Measured(index, *quality(image))
        if progress:
            progress("measuring", done, len(indices))
    return measured


def _best(images: Sequence[_Measured], count: int) -> list[_Measured]:
    """The best images of a track, best first; of equals the earlier one."""
    by_area = _ranks([-image.area for image in images])
    by_sharpness = _ranks([-image.sharpness for image in images])
    order = sorted(range(len(images)), key=lambda i: (by_area[i] + by_sharpness[i], images[i].index))
    return [images[i] for i in order[:count]]


def _ranks(values: Sequence[float]) -> list[int]:
    """How many values are less than each."""
    return np.searchsorted(np.sort(values), values).tolist()


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean of unit rows `[n, dim]` as a unit float32 `[dim]`."""
    rows = rows.astype(np.float32)
    mean = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _row(rows: Sequence[Row], taken: Sequence[_Measured], indices: Sequence[int]) -> Row:
    return replace(
        rows[taken[0].index],
        identity=_agreed([rows[index].identity for index in indices]),
        camera=_agreed([rows[index].camera for index in indices]),
    )


def _agreed(values: Sequence[T]) -> T | None:
    return values[0] if len(set(values)) == 1 else None


def _table(rows: Sequence[Row], taken: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [(images[0].index, one, rank) for images in taken for rank, one in enumerate(images, start=1)]
    table = {
        "track_row": [printable(rows[first].name) for first, _, _ in lines],
        "image": [printable(rows[one.index].name) for _, one, _ in lines],
        "rank": pa.array([rank for _, _, rank in lines], pa.int32()),
        "area": pa.array([one.area for _, one, _ in lines], pa.int64()),
        "sharpness": [one.sharpness if one.sharpness >= 0 else None for _, one, _ in lines],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    return buffer.getvalue()
