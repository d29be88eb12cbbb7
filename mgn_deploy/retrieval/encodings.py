"""k-reciprocal encodings (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017).

Sections and equations are the paper's. Where it leaves something open, the authors' program decides
(github.com/zhunzhong07/person-re-ranking, python-version, whose conventions torchreid and fast-reid kept):

- The original distance of images i and j is their squared Euclidean distance divided by the largest one of image i.
  For rows of unit length the cosine distance, divided in the same way, is the same number.
- An image is its own first neighbour, so that N(i, k1) has k1 + 1 members and N(i, k1 / 2) has round(k1 / 2) + 1; round
  is NumPy's, halves go to the even number.

The authors' program holds several N x N matrices, 2.1 GB each for Market-1501's 23,100 images. Here encodings are
sparse, N rows of about a hundred values, and only tiles of distances exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mgn_deploy.choices import Device
from mgn_deploy.errors import UserError
from mgn_deploy.machine import usable_cpus
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.neighbours import Neighbours, find_neighbours
from mgn_deploy.retrieval.rows import check_embeddings, slices, squared_lengths

K1, K2 = 20, 6  # the authors', for every data set of the paper
BLOCK_VALUES = 1 << 23  # of an intermediate array, so that memory does not grow with N
JACCARD_VALUES = 1 << 19  # of a block of Jaccard distances: 4 MiB of sums, which a core's cache holds


@dataclass(frozen=True)
class Encodings:
    """k-reciprocal encodings of n images (section 3.3), a sparse `[n, n]` matrix by rows (CSR) and by columns (CSC).

    Attributes:
        neighbours: of each image.
        rows, columns: (offsets int64 `[n + 1]`, indices int64, values float32) each.
        squares: float32 `[n]`, the embeddings' squared lengths.
        arrays: where original distances are computed.
    """

    neighbours: Neighbours
    rows: _Sparse
    columns: _Sparse
    squares: np.ndarray
    arrays: Arrays

    def __len__(self) -> int:
        return len(self.neighbours.indices)

    def jaccard(self, wanted: slice) -> np.ndarray:
        """Jaccard distances of these images to all (equation 10), float32 `[wanted, n]`."""
        start, stop, _ = wanted.indices(len(self))
        n = len(self)
        height = max(1, JACCARD_VALUES // n)
        out = np.empty((stop - start, n), np.float32)

        def fill(first: int) -> None:
            last = min(first + height, stop)
            row, column, value = self.rows.entries(np.arange(first, last))
            entry, image, other = self.columns.entries(column)
            smaller = np.minimum(value[entry], other)
            common = np.bincount(row[entry] * n + image, smaller, (last - first) * n)
            some = np.flatnonzero(common)
            distances = out[first - start : last - start].reshape(-1)
            distances.fill(1)
            distances[some] -= common[some] / (2 - common[some])

        with ThreadPoolExecutor(usable_cpus()) as pool:
            list(pool.map(fill, range(start, stop, height)))
        return out

    def add_original(
        self, images: np.ndarray, rows: slice, columns: slice, weight: float, distances: np.ndarray
    ) -> None:
        """Add `weight` times the original distances (0 to 1) of `rows` to `columns`; `images` are those encoded."""
        arrays, mine = self.arrays, self.arrays.put(images[rows])
        scale = np.float32(weight) / _or_one(self.neighbours.farthest[rows])[:, None]

        def finish(part: slice) -> None:
            here = products[part]
            here *= -2
            here += self.squares[rows][part, None]
            here += self.squares[block]
            np.maximum(here, 0, out=here)
            here *= scale[part]
            distances[part, block.start - columns.start : block.stop - columns.start] += here

        with ThreadPoolExecutor(usable_cpus()) as pool:
            for within in _blocks(columns.stop - columns.start, images.shape[1]):
                block = slice(columns.start + within.start, columns.start + within.stop)
                products = arrays.get(arrays.product(mine, arrays.put(images[block])))
                list(pool.map(finish, _blocks(len(products), 64 * (block.stop - block.start))))


def encode(
    images: np.ndarray,
    *,
    k1: int = K1,
    k2: int = K2,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> Encodings:
    """Encode images by their k-reciprocal neighbours, each other's at once: what `jaccard` compares.

    Args:
        images: embeddings `[n, d]`, float32 or float16.
        k1: neighbours whose reciprocity is looked at (equation 3).
        k2: neighbours whose encodings are averaged, the image among them (equation 11); 1: none are.
        device: where the nearest neighbours and original distances are computed.
        progress: called with the tiles of neighbours done.

    Raises:
        UserError: embeddings that are empty or not finite; k1 or k2 below 1.
    """
    if k1 < 1 or k2 < 1:
        raise UserError(f"k1 is {k1} and k2 is {k2}, but both have to be at least 1")
    check_embeddings(images, images[:1], "euclidean")
    arrays = Arrays.open(device)
    neighbours = find_neighbours(images, max(k1 + 1, k2), arrays=arrays, progress=progress)
    members = _expanded(neighbours.indices[:, : k1 + 1], 1 + int(np.around(k1 / 2)))
    encodings = _weighted(images, neighbours, members)
    if k2 != 1:
        encodings = _averaged(encodings, neighbours.indices[:, :k2])
    squares = np.concatenate([squared_lengths(images[rows]) for rows in _blocks(len(images), images.shape[1])])
    return Encodings(neighbours, encodings, encodings.transposed(), squares, arrays)


@dataclass(frozen=True)
class _Sparse:
    """A square sparse matrix, line by line: line i has `indices` and `values` from `offsets[i]` to `offsets[i + 1]`."""

    offsets: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, lines: np.ndarray, indices: np.ndarray, values: np.ndarray, n: int) -> _Sparse:
        """Of entries whose lines ascend."""
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(np.bincount(lines, minlength=n), out=offsets[1:])
        return cls(offsets, indices, values)

    def transposed(self) -> _Sparse:
        n = len(self.offsets) - 1
        lines = np.repeat(np.arange(n), np.diff(self.offsets))
        order = np.argsort(self.indices, kind="stable")
        return _Sparse.of(self.indices[order], lines[order], self.values[order], n)

    def entries(self, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All entries of some lines: (which of `lines`, index, value), each `[entries]`."""
        counts = self.offsets[lines + 1] - self.offsets[lines]
        which = np.repeat(np.arange(len(lines)), counts)
        ends = np.cumsum(counts)
        flat = np.arange(len(which)) + np.repeat(self.offsets[lines] - ends + counts, counts)
        return which, self.indices[flat], self.values[flat]


def _reciprocal(nearest: np.ndarray) -> np.ndarray:
    """Whether image i is among the nearest of its neighbours, bool `[n, k]` (equation 2)."""
    n, k = nearest.shape
    mask = np.empty((n, k), bool)
    for rows in _blocks(n, k * k):
        here = np.arange(rows.start, rows.stop)
        mask[rows] = (nearest[nearest[rows]] == here[:, None, None]).any(axis=2)
    return mask


def _expanded(nearest: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """R*(i, k1) of every image as entries (i, member), both ascending (equation 3)."""
    n, k = nearest.shape
    mask, half_nearest = _reciprocal(nearest), nearest[:, :half]
    half_mask = _reciprocal(half_nearest)
    parts = []
    for rows in _blocks(n, k * half_nearest.shape[1] * k):
        candidates = nearest[rows]
        theirs, is_theirs = half_nearest[candidates], half_mask[candidates]  # [rows, k, half]
        mine = np.where(mask[rows], candidates, -1)
        common = (theirs[..., None] == mine[:, None, None, :]).any(axis=3) & is_theirs
        taken = common.sum(axis=2) > 2.0 / 3 * is_theirs.sum(axis=2)
        taken &= mask[rows]
        row, first = np.nonzero(mask[rows])
        expanded_row, which, member = np.nonzero(is_theirs & taken[..., None])
        keys = np.concatenate(
            [row * n + candidates[row, first], expanded_row * n + theirs[expanded_row, which, member]]
        )
        parts.append(np.unique(keys) + rows.start * n)
    return np.divmod(np.concatenate(parts), n)


def _weighted(images: np.ndarray, neighbours: Neighbours, members: tuple[np.ndarray, np.ndarray]) -> _Sparse:
    """Members weigh exp(-original distance) (equation 7), and each image's weights sum to 1."""
    row, member = members
    n, k = neighbours.indices.shape
    # Most members are among the image's nearest, whose distances are known; the others are its neighbours' neighbours.
    keys = (np.arange(n)[:, None] * n + neighbours.indices).ravel()
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys, row * n + member, sorter=order), n * k - 1)
    known = keys[order[place]] == row * n + member
    distances = np.empty(len(row), np.float32)
    distances[known] = neighbours.distances.ravel()[order[place[known]]]
    others = np.flatnonzero(~known)

    def measure(part: slice) -> None:
        here = others[part]
        difference = np.asarray(images[row[here]], np.float32) - np.asarray(images[member[here]], np.float32)
        distances[here] = np.einsum("ij,ij->i", difference, difference)

    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(measure, _blocks(len(others), 8 * images.shape[1])))
    weights = np.exp(-distances / _or_one(neighbours.farthest)[row])
    sums = np.bincount(row, weights, n)
    return _Sparse.of(row, member, (weights / sums[row]).astype(np.float32), n)


def _averaged(encodings: _Sparse, nearest: np.ndarray) -> _Sparse:
    """Local query expansion: an image's encoding becomes the mean of its k2 nearest images' (equation 11)."""
    n, k2 = nearest.shape
    lines, indices, values = [], [], []
    for rows in _blocks(n, 64 * k2):
        which, index, value = encodings.entries(nearest[rows].ravel())
        keys = which // k2 * n + index
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begin = np.flatnonzero(np.diff(keys, prepend=-1))
        lines.append(keys[begin] // n + rows.start)
        indices.append(keys[begin] % n)
        values.append(np.add.reduceat(value[order], begin) / np.float32(k2) if len(begin) else value[:0])
    return _Sparse.of(np.concatenate(lines), np.concatenate(indices), np.concatenate(values), n)


def _or_one(farthest: np.ndarray) -> np.ndarray:
    """Divisors: images that are all equal have no largest distance."""
    return np.where(farthest > 0, farthest, np.float32(1))


def _blocks(n: int, values: int) -> Iterator[slice]:
    """Slices of n rows with so many values a row that a block has about `BLOCK_VALUES`."""
    return slices(n, max(1, BLOCK_VALUES // values))
