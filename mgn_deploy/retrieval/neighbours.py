"""The nearest and the farthest image of each of a set: every pair of tiles is multiplied once.

Half the products of a search of all in all: the tile of images I and J serves the rows of both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mgn_deploy.machine import usable_cpus
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays, first_largest
from mgn_deploy.retrieval.rows import even_step, slices

SIDE = 4096  # most images of a tile: 64 MiB of products
CHUNK_VALUES = 1 << 18  # of it that a thread selects from at a time: 1 MiB, which a core's cache holds


@dataclass(frozen=True)
class Neighbours:
    """Of n images among themselves, by squared Euclidean distance.

    Attributes:
        indices: int64 `[n, k]`, the nearest first, usually the image itself; equal distances by lower index.
        distances: float32 `[n, k]`, squared.
        farthest: float32 `[n]`, the squared distance of the farthest image.
    """

    indices: np.ndarray
    distances: np.ndarray
    farthest: np.ndarray


def find_neighbours(
    images: np.ndarray, k: int, *, arrays: Arrays, side: int = SIDE, progress: Progress | None = None
) -> Neighbours:
    """Find the k nearest images of each, all of them where there are fewer.

    Which of equally near images come k-th is decided by the lower index where NumPy computes, and by chance elsewhere.

    Args:
        images: finite embeddings `[n, d]`, float32 or float16.
        k: at least 1.
        arrays: what computes the products.
        side: images of a tile.
        progress: called with the tiles done.
    """
    n, k = len(images), min(k, len(images))
    lowest = np.full(n, np.inf, np.float32)  # of -distance / 2
    parts = list(slices(n, even_step(n, side)))
    best = _Best(np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32))
    # Tiles of images with themselves come first: what beats the k-th best that they give is little in all the others.
    pairs = [*zip(parts, parts, strict=True), *combinations(parts, 2)]
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for done, (rows, columns) in enumerate(pairs, 1):
            mine = arrays.put(images[rows])
            theirs = mine if columns == rows else arrays.put(images[columns])
            half, their_half = (arrays.xp.sum(side * side, axis=1) / 2 for side in (mine, theirs))
            tile = arrays.product(mine, theirs)
            if arrays.is_numpy:
                _take_by_threads(pool, best, lowest, tile, half, their_half, rows, columns)
            else:
                tile -= half[:, None]
                tile -= their_half[None, :]
                turns = [(tile, rows, columns)] if columns == rows else [(tile, rows, columns), (tile.T, columns, rows)]
                for values, here, there in turns:
                    lowest[here] = np.minimum(lowest[here], arrays.get(arrays.xp.min(values, axis=1)))
                    kept, found = arrays.largest(values, min(k, values.shape[1]))
                    line = np.repeat(np.arange(len(kept)), kept.shape[1])
                    _merge(best, here, line, kept.ravel() + there.start, found.ravel())
            if progress:
                progress("neighbours", done, len(pairs))
    return Neighbours(best.indices, np.maximum(-2 * best.values, 0), np.maximum(-2 * lowest, 0))


@dataclass(frozen=True)
class _Best:
    """The k best of each image so far, the best first."""

    indices: np.ndarray
    values: np.ndarray


def _take_by_threads(
    pool: ThreadPoolExecutor,
    best: _Best,
    lowest: np.ndarray,
    tile: np.ndarray,
    half: np.ndarray,
    their_half: np.ndarray,
    rows: slice,
    columns: slice,
) -> None:
    """Merge a tile of products into what is known of its rows and columns: chunk by chunk, each passed over while it
    is in a core's cache."""
    theirs = _to_beat(best, columns, rows)

    def take(start: int) -> tuple[np.ndarray, ...]:
        chunk = tile[start : start + height]
        here = slice(rows.start + start, rows.start + start + len(chunk))
        chunk -= half[start : start + height, None]
        chunk -= their_half
        lowest[here] = np.minimum(lowest[here], chunk.min(axis=1))
        line, index = _better(chunk, _to_beat(best, here, columns)[:, None], best.indices.shape[1])
        _merge(best, here, line, columns.start + index, chunk[line, index])
        if columns == rows:
            return ()
        index, line = _better(chunk, theirs, best.indices.shape[1], by_column=True)
        return line, here.start + index, chunk[index, line], chunk.min(axis=0)

    height = max(1, CHUNK_VALUES // tile.shape[1])
    taken = list(pool.map(take, range(0, len(tile), height)))
    if columns != rows:
        lines, indices, values, lows = zip(*taken, strict=True)
        lowest[columns] = np.minimum(lowest[columns], np.min(lows, axis=0))
        _merge(best, columns, np.concatenate(lines), np.concatenate(indices), np.concatenate(values))


def _to_beat(best: _Best, rows: slice, others: slice) -> np.ndarray:
    """What a value of `others` has to exceed to be among the best of `rows`, float32 `[rows]`.

    That is the k-th best, and just less where it has a higher index than the others and would lose a tie.
    """
    last = best.values[rows, -1]
    return np.where(best.indices[rows, -1] >= others.start, np.nextafter(last, np.float32(-np.inf)), last)


def _better(chunk: np.ndarray, bound: np.ndarray, k: int, *, by_column: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of the values above `bound`; where those are many, of the k largest of each row (or column)."""
    found = np.flatnonzero(chunk > bound)
    if len(found) <= chunk.size // 32:
        row, column = np.divmod(found, chunk.shape[1])
        return row, column
    lines = np.ascontiguousarray(chunk.T) if by_column else chunk
    index = first_largest(lines, min(k, lines.shape[1])).ravel()
    line = np.repeat(np.arange(len(lines)), len(index) // len(lines))
    return (index, line) if by_column else (line, index)


def _merge(best: _Best, rows: slice, line: np.ndarray, index: np.ndarray, value: np.ndarray) -> None:
    """Keep the k best of those that `rows` have and of these: (line within `rows`, index, value) each."""
    lines = np.unique(line)
    if not len(lines):
        return
    k = best.indices.shape[1]
    old = lines + rows.start
    line = np.concatenate([np.repeat(np.arange(len(lines)), k), np.searchsorted(lines, line)])
    index = np.concatenate([best.indices[old].ravel(), index])
    value = np.concatenate([best.values[old].ravel(), value])
    order = np.lexsort((index, -value, line))
    starts = np.searchsorted(line[order], np.arange(len(lines)))
    first = order[starts[:, None] + np.arange(k)]
    best.indices[old], best.values[old] = index[first], value[first]
