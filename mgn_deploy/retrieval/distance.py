"""Distances between embeddings and exact nearest neighbours: BLAS products in tiles of bounded memory.

Embeddings are [n, d] rows of unit length, float32 or float16, in memory or `np.memmap`. A product's last bits
depend on how BLAS blocks it, so two tile sizes may differ by a few 1e-7 and two identical gallery rows need
not tie exactly.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import numpy as np

from mgn_deploy.choices import Metric
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.progress import Progress

TILE_BYTES = 256 << 20


def distance_matrix(
    query: np.ndarray,
    gallery: np.ndarray,
    metric: Metric = "cosine",
    *,
    out: np.ndarray | None = None,
    tile_bytes: int = TILE_BYTES,
    progress: Progress | None = None,
) -> np.ndarray:
    """Compute the distances [q, g], float32: cosine is 1 - q.g, euclidean is sqrt(max(0, |q|^2 + |g|^2 - 2 q.g)).

    Rounding leaves the cosine of two equal rows within about 1e-6 of zero, their euclidean within about 1e-3.
    Memory beyond the result stays below `tile_bytes`, down to a tile of one row by one row. `out` is a
    float32 [q, g] array to fill, rows contiguous or not.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; an `out` of other shape or dtype.
    """
    check_embeddings(query, gallery, metric, tile_bytes)
    shape = (len(query), len(gallery))
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise UserError(f"out is {out.dtype} {list(out.shape)}, but has to be float32 {list(shape)}")
    for rows, columns in _tiles(query, gallery, tile_bytes):
        _distances(query[rows], gallery[columns], metric, out[rows, columns])
        _report(progress, rows, columns, shape)
    return out


def distance_rows(
    query: np.ndarray, gallery: np.ndarray, metric: Metric = "cosine", *, tile_bytes: int = TILE_BYTES
) -> Iterator[tuple[slice, np.ndarray]]:
    """Compute the rows of `distance_matrix` a few queries at a time: (rows, float32 [rows, g]).

    The array is overwritten by the next. Memory stays below `tile_bytes` where one whole row and one pair of
    embeddings fit.
    """
    check_embeddings(query, gallery, metric, tile_bytes)
    height = max(1, tile_bytes // (8 * len(gallery)))  # half for these, half for embeddings
    buffer = np.empty((min(height, len(query)), len(gallery)), np.float32)
    for rows in _slices(len(query), height):
        part = query[rows]
        distances = buffer[: len(part)]
        for within, columns in _tiles(part, gallery, tile_bytes // 2):
            _distances(part[within], gallery[columns], metric, distances[within, columns])
        yield rows, distances


def write_distance_matrix(
    path: Path, query: np.ndarray, gallery: np.ndarray, metric: Metric, *, progress: Progress | None = None
) -> None:
    """Write `distance_matrix` to a float32 [q, g] .npy that gets its name once it is whole and on disk.

    The space is reserved first. Rows are written, not mapped: on a full disk a write is an error that can be
    told to the user, where a store into a mapped page kills the process with SIGBUS.

    Raises:
        UserError: as `distance_matrix`; a file that cannot be written; a disk without room for it all.
    """
    check_embeddings(query, gallery, metric, TILE_BYTES)
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
            for rows, columns in _tiles(query, gallery, TILE_BYTES // 2):  # the last tile is still held
                tile = _distances(query[rows], gallery[columns], metric, None)
                for row, distances in enumerate(tile, rows.start):
                    os.lseek(file.fileno(), start + row * width + 4 * columns.start, os.SEEK_SET)
                    _write(file.fileno(), distances)
                _report(progress, rows, columns, shape)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path} cannot be written ({error.strerror}): {needed} bytes are needed and {free} are free "
                "there; free some space or choose another disk"
            ) from error


def top_k(
    query: np.ndarray,
    gallery: np.ndarray,
    k: int,
    *,
    excluded: Callable[[slice], np.ndarray] | None = None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k gallery rows of largest inner product, exactly: indices and similarities.

    Both are [q, k'], int64 and float32, best first, equal similarities by lower gallery index, at rank k too;
    k' = min(k, g). `excluded(rows)` is a bool [rows, g] mask of gallery rows not to return for
    these queries (a slice of the query rows). Where a query runs out of candidates, the index is -1 and the
    similarity -inf. Memory beyond the result stays below `tile_bytes`, down to one query by one gallery row
    (and one mask row).

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; k below 1.
    """
    check_embeddings(query, gallery, "cosine", tile_bytes)
    if k < 1:
        raise UserError(f"k is {k}, but at least 1 neighbour has to be asked for")
    k = min(k, len(gallery))
    indices = np.empty((len(query), k), np.int64)
    similarities = np.empty((len(query), k), np.float32)

    row_bytes = 4 * query.shape[1]
    width = min(len(gallery), max(1, tile_bytes // 4 // row_bytes))
    # Of a query: itself, its similarities to a tile (twice: `_best` partitions a copy) with a mask of them,
    # and the merge of k old with up to k new candidates (values, indices, order, and what the order picks).
    query_bytes = row_bytes + 9 * width + 40 * (k + min(k, width)) + (len(gallery) if excluded else 0)
    height = max(1, tile_bytes * 3 // 4 // query_bytes)

    for rows in _slices(len(query), height):
        indices[rows], similarities[rows] = _top_k(
            _float32(query[rows]), gallery, k, excluded(rows) if excluded else None, width
        )
    return indices, similarities


def check_embeddings(query: np.ndarray, gallery: np.ndarray, metric: Metric, tile_bytes: int = TILE_BYTES) -> None:
    """Raise a UserError unless both are finite floating [n, d], not empty, of one d, and the metric known."""
    if metric not in get_args(Metric):
        raise UserError(f"the metric {metric!r} is not known: choose one of {', '.join(get_args(Metric))}")
    for name, embeddings in (("query", query), ("gallery", gallery)):
        if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
            form = f"{embeddings.dtype} {list(embeddings.shape)}"
            raise UserError(f"the {name} embeddings are {form}, but have to be floating [images, dimensions]")
        if embeddings.size == 0:
            raise UserError(f"the {name} embeddings are empty {list(embeddings.shape)}: embed some images first")
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"query embeddings have {query.shape[1]} dimensions and gallery embeddings {gallery.shape[1]}: "
            "both have to come from the same model"
        )
    for name, embeddings in (("query", query), ("gallery", gallery)):
        for rows in _slices(len(embeddings), max(1, tile_bytes // (8 * embeddings.shape[1]))):
            # Squares, as they need no mask beside the tile and bound every product (Cauchy-Schwarz).
            broken = np.flatnonzero(~np.isfinite(_squares(_float32(embeddings[rows]))))
            if broken.size:
                row = rows.start + int(broken[0])
                raise UserError(f"{name} embedding {row} is not finite (NaN, infinite or huge): embed it again")


def _distances(query: np.ndarray, gallery: np.ndarray, metric: Metric, out: np.ndarray | None) -> np.ndarray:
    query, gallery = _float32(query), _float32(gallery)
    out = np.matmul(query, gallery.T, out=out)
    if metric == "cosine":
        return np.subtract(1, out, out=out)
    out *= -2
    out += _squares(query)[:, None]
    out += _squares(gallery)
    return np.sqrt(np.maximum(out, 0, out=out), out=out)


def _top_k(
    query: np.ndarray, gallery: np.ndarray, k: int, mask: np.ndarray | None, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` of one tile of queries, `width` gallery rows at a time."""
    best = np.empty((len(query), 0), np.float32)
    indices = np.empty((len(query), 0), np.int64)
    for columns in _slices(len(gallery), width):
        products = query @ _float32(gallery[columns]).T
        if mask is not None:
            products[mask[:, columns]] = -np.inf
        kept = _best(products, min(k, products.shape[1]))
        values = np.concatenate([best, np.take_along_axis(products, kept, axis=1)], axis=1)
        # Earlier tiles first, each by index: so a stable sort leaves equal values by index.
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(values, order, axis=1)
        indices = np.take_along_axis(np.concatenate([indices, kept + columns.start], axis=1), order, axis=1)
    indices[best == -np.inf] = -1
    return indices, best


def _best(values: np.ndarray, k: int) -> np.ndarray:
    """Columns [n, k], ascending, of each row's k largest values; of equal ones the first."""
    width = values.shape[1]
    if k == width:
        return np.broadcast_to(np.arange(width), values.shape)
    kth = np.partition(values, width - k, axis=1)[:, width - k, None]
    kept = values >= kth
    if np.count_nonzero(kept) > k * len(kept):
        surplus = np.count_nonzero(kept, axis=1) - k
        for row in np.flatnonzero(surplus):
            ties = np.flatnonzero(values[row] == kth[row])
            kept[row, ties[-surplus[row] :]] = False
    return np.flatnonzero(kept).reshape(-1, k) % width


def _tiles(query: np.ndarray, gallery: np.ndarray, tile_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Square tiles of side s: s queries, s gallery rows, s x s distances in float32: 4(2ds + s^2) bytes."""
    dim = query.shape[1]
    side = max(1, math.isqrt(dim * dim + tile_bytes // 4) - dim)
    for rows in _slices(len(query), side):
        for columns in _slices(len(gallery), side):
            yield rows, columns


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _squares(embeddings: np.ndarray) -> np.ndarray:
    """Squared length of each row."""
    return np.einsum("ij,ij->i", embeddings, embeddings)


def _float32(embeddings: np.ndarray) -> np.ndarray:
    """C-contiguous float32, without a copy where they are."""
    return np.ascontiguousarray(embeddings, dtype=np.float32)


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


def _write(descriptor: int, values: np.ndarray) -> None:
    rest = values.data.cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]
