"""The nearest and the farthest image of each of a set: every pair of tiles is multiplied once.

Half the products of a search of all in all: the tile of images I and J serves the rows of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays

SIDE = 4096  # images of a tile: 64 MiB of products
CHUNK = 256  # rows of it that a thread selects from at a time


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
    parts = [slice(start, min(start + side, n)) for start in range(0, n, side)]
    best = _Best(np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32))
    done, total = 0, len(parts) * (len(parts) + 1) // 2
    with ThreadPoolExecutor(os.cpu_count() if arrays.is_numpy else 1) as pool:
        for i, rows in enumerate(parts):
            mine = arrays.put(images[rows])
            half = arrays.xp.sum(mine * mine, axis=1) / 2
            for columns in parts[i:]:
                theirs = mine if columns == rows else arrays.put(images[columns])
                their_half = half if columns == rows else arrays.xp.sum(theirs * theirs, axis=1) / 2
                tile = arrays.product(mine, theirs)
                tile -= half[:, None]
                tile -= their_half[None, :]
                turns = [(tile, rows, columns)] if columns == rows else [(tile, rows, columns), (tile.T, columns, rows)]
                list(pool.map(lambda turn: _take(arrays, best, lowest, *turn), _chunks(turns, arrays.is_numpy)))
                done += 1
                if progress:
                    progress("neighbours", done, total)
    return Neighbours(best.indices, np.maximum(-2 * best.values, 0), np.maximum(-2 * lowest, 0))


@dataclass(frozen=True)
class _Best:
    """The k best of each image so far, the best first."""

    indices: np.ndarray
    values: np.ndarray


def _chunks(turns: list[tuple[Any, slice, slice]], small: bool) -> Iterator[tuple[Any, slice, slice]]:
    for tile, rows, columns in turns:
        step = CHUNK if small else tile.shape[0]
        for start in range(0, tile.shape[0], step):
            part = tile[start : start + step]
            yield part, slice(rows.start + start, rows.start + start + part.shape[0]), columns


def _take(arrays: Arrays, best: _Best, lowest: np.ndarray, tile: Any, rows: slice, columns: slice) -> None:
    """Merge a tile, of -distance / 2 of `rows` to `columns`, into what is known of `rows`.

    Columns ascend from call to call, so that a value that only equals the k-th best so far has a higher index.
    """
    k = best.indices.shape[1]
    if arrays.is_numpy:
        tile = np.ascontiguousarray(tile)
    lowest[rows] = np.minimum(lowest[rows], arrays.get(arrays.xp.min(tile, axis=1)))
    if arrays.is_numpy:
        better = np.flatnonzero(tile > best.values[rows, -1:])
        if len(better) < tile.size // 32:  # most tiles: only these are looked at
            _merge(best, rows, better // tile.shape[1], columns.start + better % tile.shape[1], tile.ravel()[better])
            return
    kept, found = arrays.largest(tile, min(k, tile.shape[1]))
    line = np.repeat(np.arange(len(kept)), kept.shape[1])
    _merge(best, rows, line, kept.ravel() + columns.start, found.ravel())


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
