"""Distances between embeddings: products in tiles of bounded memory, on the CPU or a CUDA device.

Embeddings are [n, d] rows of unit length, float32 or float16, in memory or `np.memmap`. A product's last bits
depend on how BLAS blocks it, so two tile sizes may differ by a few 1e-7 and two identical gallery rows need
not tie exactly.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.choices import Device, Metric
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.machine import usable_cpus
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.rows import TILE_BYTES, check_embeddings, even_step, slices

ROWS_BYTES = 512 << 20  # where whole rows are held besides: 256 MiB took 7% longer at Market-1501's size
DIRECT_TILE_BYTES = 4 << 30  # where a tile takes no memory: one call of BLAS repeats less work than several
CHUNK_BYTES = 1 << 19  # of a tile that a thread turns from products into distances, while they are in its cache
SAMPLE = (256, 2048)  # queries and gallery rows that `measured_error` compares


def distance_matrix(
    query: np.ndarray,
    gallery: np.ndarray,
    metric: Metric = "cosine",
    *,
    out: np.ndarray | None = None,
    tile_bytes: int = TILE_BYTES,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """Compute the distances [q, g], float32: cosine is 1 - q.g, euclidean is sqrt(|q|^2 + |g|^2 - 2 q.g).

    Cosine distances are clamped to 0 to 2: rounding, above all of embeddings that are kept as float16 and no longer
    quite of unit length, would leave some just outside. Squared Euclidean ones below 0 count as 0. The cosine of two
    equal unit rows is within about 1e-6 of zero (1e-3 for float16), their euclidean within about 1e-3.

    Memory beyond the result stays below `tile_bytes`, down to a tile of one row by one row; on a device, of the device.
    Float32 rows on the CPU need none for cosine distances.
    `out` is a float32 [q, g] array to fill, rows contiguous or not.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; an `out` of other shape or dtype.
        CannotRun: a device that is not there.
    """
    check_embeddings(query, gallery, metric, tile_bytes)
    arrays = Arrays.open(device)
    shape = (len(query), len(gallery))
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise UserError(f"out is {out.dtype} {list(out.shape)}, but has to be float32 {list(shape)}")
    for rows, columns in _tiles(query, gallery, _without_copies(arrays, query, gallery, metric, tile_bytes)):
        _distances(arrays, query[rows], gallery[columns], metric, out[rows, columns])
        _report(progress, rows, columns, shape)
    return out


def distance_rows(
    query: np.ndarray,
    gallery: np.ndarray,
    metric: Metric = "cosine",
    *,
    tile_bytes: int = ROWS_BYTES,
    device: Device | Arrays = "cpu",
) -> Iterator[tuple[slice, np.ndarray]]:
    """Compute the rows of `distance_matrix` a few queries at a time: (rows, float32 [rows, g]).

    The array is overwritten by the next. Memory stays below `tile_bytes` where one whole row and one pair of
    embeddings fit.
    """
    check_embeddings(query, gallery, metric, tile_bytes)
    arrays = Arrays.open(device)
    height = max(1, tile_bytes // (8 * len(gallery)))  # half for these, half for embeddings
    buffer = np.empty((min(height, len(query)), len(gallery)), np.float32)
    for rows in slices(len(query), even_step(len(query), height)):
        part = query[rows]
        distances = buffer[: len(part)]
        for within, columns in _tiles(part, gallery, _without_copies(arrays, part, gallery, metric, tile_bytes // 2)):
            _distances(arrays, part[within], gallery[columns], metric, distances[within, columns])
        yield rows, distances


def measured_error(
    query: np.ndarray, gallery: np.ndarray, metric: Metric = "cosine", *, device: Device | Arrays = "cpu"
) -> float:
    """The largest absolute difference from float64's distances, on a sample of evenly spaced rows.

    What float16 or TF32 cost on these very embeddings; float32's own is about 1e-7.
    """
    few = [rows[:: max(1, len(rows) // size)][:size] for rows, size in zip((query, gallery), SAMPLE, strict=True)]
    found = distance_matrix(few[0], few[1], metric, device=device)
    left, right = (np.asarray(rows, np.float64) for rows in few)
    products = left @ right.T
    exact = np.clip(1 - products, 0, 2)
    if metric == "euclidean":
        squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
        exact = np.sqrt(np.maximum(squares - 2 * products, 0))
    return float(np.abs(found - exact).max())


def write_distance_matrix(
    path: Path,
    query: np.ndarray,
    gallery: np.ndarray,
    metric: Metric,
    *,
    tile_bytes: int = TILE_BYTES,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write `distance_matrix` to a float32 [q, g] .npy that gets its name once it is whole and on disk.

    The space is reserved first. Rows are written, not mapped: on a full disk a write is an error that can be
    told to the user, where a store into a mapped page kills the process with SIGBUS.

    Raises:
        UserError: as `distance_matrix`; a file that cannot be written; a disk without room for it all.
    """
    check_embeddings(query, gallery, metric, tile_bytes)
    arrays = Arrays.open(device)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of the .npy file to write")
    shape = (len(query), len(gallery))
    width = 4 * len(gallery)
    with atomic_file(path) as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        needed = start + len(query) * width
        try:
            if needed > shutil.disk_usage(path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Past the file object's buffer: what it still held would fail a second time as it closes.
            file.flush()
            _reserve(file.fileno(), needed)
            for rows, columns in _tiles(query, gallery, tile_bytes // 2):  # the last tile is still held
                tile = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
                _distances(arrays, query[rows], gallery[columns], metric, tile)
                for row, distances in enumerate(tile, rows.start):
                    _write(file.fileno(), distances, start + row * width + 4 * columns.start)
                _report(progress, rows, columns, shape)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path} cannot be written ({error.strerror}): {needed} bytes are needed and {free} are free "
                "there; free some space or choose another disk"
            ) from error


def _distances(arrays: Arrays, query: np.ndarray, gallery: np.ndarray, metric: Metric, out: np.ndarray) -> None:
    left, right = arrays.put(query), arrays.put(gallery)
    xp = arrays.xp
    whole = arrays.product(left, right, out if arrays.is_numpy else None)
    squares = [xp.sum(side * side, axis=1) for side in (left, right)] if metric == "euclidean" else None

    def finish(rows: slice) -> None:
        values = whole[rows, :]
        if squares is None:
            values = np.subtract(1, values, out=values) if arrays.is_numpy else 1 - values
            values = _clamp(arrays, values, 2)
        else:
            values *= -2
            values += squares[0][rows, None]
            values += squares[1][None, :]
            values = xp.sqrt(_clamp(arrays, values, None))
        if not arrays.is_numpy or squares is not None:
            out[rows] = arrays.get(values)

    if arrays.is_numpy:  # a chunk stays in a core's cache; of Euclidean distances it has a copy, half the tile at most
        threads = usable_cpus()
        height = max(1, min(len(query) // (2 * threads), CHUNK_BYTES // (4 * len(gallery))))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(finish, slices(len(query), height)))
    else:
        finish(slice(0, len(query)))


def _clamp(arrays: Arrays, values: Any, high: float | None) -> Any:
    """To 0 and above, and to `high` and below."""
    if arrays.is_numpy:
        return np.clip(values, 0, high, out=values)  # in place, where the array API has none
    return arrays.xp.clip(values, 0, high)


def _without_copies(arrays: Arrays, query: np.ndarray, gallery: np.ndarray, metric: Metric, tile_bytes: int) -> int:
    """What tiles may take: more where rows are used as they are and their products go straight into the result."""
    as_they_are = all(rows.dtype == np.float32 and rows.flags.c_contiguous for rows in (query, gallery))
    direct = arrays.is_numpy and arrays.compute == "float32" and metric == "cosine" and as_they_are
    return max(tile_bytes, DIRECT_TILE_BYTES) if direct else tile_bytes


def _tiles(query: np.ndarray, gallery: np.ndarray, tile_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of at most s queries and s gallery rows, with s x s distances in float32 and half of them once more:
    4(2ds + 1.5 s^2) bytes. All are about as large: BLAS is slow on a narrow last one."""
    dim = query.shape[1]
    side = max(1, (math.isqrt(4 * dim * dim + 6 * tile_bytes // 4) - 2 * dim) // 3)
    for rows in slices(len(query), even_step(len(query), side)):
        for columns in slices(len(gallery), even_step(len(gallery), side)):
            yield rows, columns


def _report(progress: Progress | None, rows: slice, columns: slice, shape: tuple[int, int]) -> None:
    if progress is not None:
        finished = rows.start * shape[1] + (rows.stop - rows.start) * columns.stop
        progress("distances", finished, shape[0] * shape[1])


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # A file system that cannot reserve still reports a full disk, only later, from a write.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _write(descriptor: int, values: np.ndarray, start: int) -> None:
    rest = values.data.cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, start)
        rest, start = rest[written:], start + written
