"""Rows of embeddings: checked, and a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import numpy as np

from mgn_deploy.choices import Metric
from mgn_deploy.errors import UserError

TILE_BYTES = 256 << 20


def check_embeddings(query: np.ndarray, gallery: np.ndarray, metric: Metric, tile_bytes: int = TILE_BYTES) -> None:
    """Raise a UserError unless both are finite floating [n, d], not empty, of one d, and the metric known."""
    if metric not in get_args(Metric):
        raise UserError(f"the metric {metric!r} is not known: choose one of {', '.join(get_args(Metric))}")
    for name, embeddings in (("query", query), ("gallery", gallery)):
        check_form(name, embeddings)
    check_same_length(query.shape[1], gallery.shape[1])
    for name, embeddings in (("query", query), ("gallery", gallery)):
        for rows in slices(len(embeddings), max(1, tile_bytes // (8 * embeddings.shape[1]))):
            check_finite(name, embeddings[rows], rows.start)


def check_form(name: str, embeddings: np.ndarray) -> None:
    """Raise a UserError unless they are floating [n, d] and not empty."""
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        form = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise UserError(f"the {name} embeddings are {form}, but have to be floating [images, dimensions]")
    if embeddings.size == 0:
        raise UserError(f"the {name} embeddings are empty {list(embeddings.shape)}: embed some images first")


def check_same_length(query: int, gallery: int) -> None:
    """Raise a UserError where the embeddings of the two have not as many dimensions."""
    if query != gallery:
        raise UserError(
            f"query embeddings have {query} dimensions and gallery embeddings {gallery}: "
            "both have to come from the same model"
        )


def check_k(k: int) -> None:
    """Raise a UserError where no neighbour is asked for."""
    if k < 1:
        raise UserError(f"k is {k}, but at least 1 neighbour has to be asked for")


def check_finite(name: str, rows: np.ndarray, start: int = 0) -> None:
    """Raise a UserError that names the first row, counted from `start`, that is not finite."""
    # Squares, as they need no mask beside the rows and bound every product (Cauchy-Schwarz).
    broken = np.flatnonzero(~np.isfinite(squared_lengths(rows)))
    if broken.size:
        raise UserError(
            f"{name} embedding {start + int(broken[0])} is not finite (NaN, infinite or huge): embed it again"
        )


def even_step(length: int, largest: int) -> int:
    """The step that divides a length into as few equal parts as `largest` allows."""
    return math.ceil(length / math.ceil(length / largest))


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of `step` rows, the last one shorter, that cover `length` rows."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def squared_lengths(embeddings: np.ndarray) -> np.ndarray:
    """Of each row, float32 `[n]`."""
    rows = np.ascontiguousarray(embeddings, dtype=np.float32)
    return np.einsum("ij,ij->i", rows, rows)
