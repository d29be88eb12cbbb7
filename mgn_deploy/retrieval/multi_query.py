"""Multiple-query (Zheng et al. 2015): each query stands for all images of its person from its camera."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mgn_deploy.choices import QueryPooling
from mgn_deploy.datasets import Dataset, LabelledImage, Subset
from mgn_deploy.errors import UserError

POOLING: dict[QueryPooling, Callable[..., Any]] = {"avg": np.mean, "max": np.max}


def needed_subsets(pooling: QueryPooling | None) -> tuple[Subset, ...]:
    """What `open_data` has to open for a validation with this pooling, or without.

    Raises:
        UserError: another pooling than avg or max.
    """
    if pooling is None:
        return ("query", "gallery")
    if pooling not in POOLING:
        raise UserError(f"--multi-query {pooling}: choose {' or '.join(POOLING)}")
    return ("query", "gallery", "multi-query")


def views_of_queries(data: Dataset) -> tuple[list[LabelledImage], list[list[int]]]:
    """The images of `data.multi_query` that show a query's person from its camera, and, for each query, which ones.

    Raises:
        UserError: there is none for any query.
    """
    wanted = {(query.identity, query.camera) for query in data.query}
    views = [image for image in data.multi_query if (image.identity, image.camera) in wanted]
    if not views:
        raise UserError(
            f"{data.root} has no further images of its queries' people: multiple-query takes them from gt_bbox"
        )
    members: dict[tuple[int, int], list[int]] = {pair: [] for pair in wanted}
    for index, image in enumerate(views):
        members[image.identity, image.camera].append(index)
    return views, [members[query.identity, query.camera] for query in data.query]


def pool_queries(
    queries: np.ndarray, views: np.ndarray, members: Sequence[Sequence[int]], pooling: QueryPooling
) -> np.ndarray:
    """One embedding a query, float32 `[q, d]`, unit rows.

    Args:
        queries: float32 `[q, d]`, unit rows.
        views: float32 `[v, d]`, unit rows.
        members: for each of the q queries the rows of `views` that are pooled; where there are none the query stays.
        pooling: avg or max, over the rows.
    """
    pooled = queries.astype(np.float32)
    for row, rows in enumerate(members):
        if rows:
            pooled[row] = POOLING[pooling](views[list(rows)], axis=0)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
