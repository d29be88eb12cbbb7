"""A store's embeddings in two dimensions, and as a table for other tools."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.choices import Projection
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, printable
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import Store
from mgn_deploy.packages import require
from mgn_deploy.retrieval.rows import check_finite


@dataclass(frozen=True)
class EmbeddingMap:
    """Where each image of a store lies.

    Attributes:
        store: whose rows they are.
        points: float32 `[len(store), 2]`.
        projection: how they were made.
        explained: the share of the embeddings' variance that the two axes hold, of PCA; None of UMAP.
    """

    store: Store
    points: np.ndarray
    projection: Projection
    explained: float | None


def map_store(store: Store, projection: Projection = "pca", *, seed: int = 0) -> EmbeddingMap:
    """Lay a store's embeddings out in two dimensions.

    PCA keeps the two directions of most variance, so distances on it are real but few groups come apart; UMAP (McInnes,
    Healy and Melville 2018) keeps neighbourhoods, and its distances between groups mean little.

    Args:
        store: with at least three images.
        projection: pca or umap.
        seed: of UMAP, which runs on one thread for it, so that a map is the same every time.

    Raises:
        CannotRun: umap-learn is not installed.
        UserError: fewer than three images, or embeddings that are not finite.
    """
    if projection not in get_args(Projection):
        raise UserError(f"no projection {projection!r}: there are {', '.join(get_args(Projection))}")
    if len(store) < 3:
        raise UserError(f"{store.folder} holds {len(store)} embedded images: a map needs at least 3")
    embeddings = store.embeddings().astype(np.float32)
    check_finite(str(store.folder), embeddings)
    if projection == "pca":
        return EmbeddingMap(store, *_pca(embeddings))
    require("umap", "umap", "--projection umap needs umap-learn")
    from umap import UMAP

    neighbours = min(15, len(store) - 1)
    # Random starts for few images: the spectral one needs more points than dimensions.
    start = "spectral" if len(store) > 10 else "random"
    model = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1, init=start)
    return EmbeddingMap(store, np.asarray(model.fit_transform(embeddings), np.float32), "umap", None)


def write_map_table(made: EmbeddingMap, out: str | os.PathLike[str], groups: np.ndarray | None = None) -> None:
    """Write a Parquet file with one row an image: id, path (of the file), x, y, vector, identity, camera, and group.

    Embedding Atlas opens it (`embedding-atlas map.parquet --x x --y y`), and FiftyOne's brain takes `vector` and x, y
    as `embeddings` and `points` (docs/how-to/identify.md).

    Args:
        made: the map.
        out: the file.
        groups: int `[len(store)]`, as `Clusters.labels`; None: no column.

    Raises:
        UserError: the file cannot be written; an earlier one is kept.
    """
    store = made.store
    embeddings = store.embeddings().astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    columns = {
        "id": pa.array(np.arange(len(store)), pa.int64()),
        "path": pa.array([_path(store, row) for row in store], pa.string()),
        "x": pa.array(made.points[:, 0]),
        "y": pa.array(made.points[:, 1]),
        "vector": vectors,
        "identity": pa.array([row.identity for row in store], pa.int64()),
        "camera": pa.array([row.camera for row in store], pa.int64()),
    }
    if groups is not None:
        columns["group"] = pa.array(groups, pa.int64())
    with atomic_file(Path(out)) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def _path(store: Store, row: Row) -> str:
    """Of the file, or what the store calls it where its source is no folder of this machine."""
    try:
        return printable(store.path(row))
    except UserError:
        return printable(row.name)


def _pca(embeddings: np.ndarray) -> tuple[np.ndarray, Projection, float]:
    centred = embeddings - embeddings.mean(axis=0)
    n, dim = centred.shape
    # The smaller of the two matrices of products has the same leading directions.
    if dim <= n:
        variances, axes = np.linalg.eigh(centred.T @ centred)
        points = centred @ axes[:, ::-1][:, :2]
    else:
        variances, axes = np.linalg.eigh(centred @ centred.T)
        points = axes[:, ::-1][:, :2] * np.sqrt(np.maximum(variances[::-1][:2], 0))
    if points.shape[1] < 2:
        points = np.concatenate([points, np.zeros((n, 2 - points.shape[1]), np.float32)], axis=1)
    # Signs are free: the largest coordinate of each axis is positive, so that a map is the same on every machine.
    points = points * np.where(points[np.abs(points).argmax(axis=0), [0, 1]] < 0, -1, 1)
    total = float(np.square(centred).sum())
    return points.astype(np.float32), "pca", float(np.square(points).sum() / total) if total else 1.0
