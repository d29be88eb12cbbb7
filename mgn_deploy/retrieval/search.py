"""Queries against a gallery store: who is nearest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgn_deploy.choices import Metric
from mgn_deploy.datasets.dataset import DISTRACTOR, JUNK
from mgn_deploy.datasets.market1501 import parse_name
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.shards import MANIFEST
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.images.listing import list_images
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.distance import top_k, write_distance_matrix
from mgn_deploy.retrieval.rank_list import RankedImage, RankList


@dataclass(frozen=True)
class Queries:
    """Images to look for.

    Attributes:
        bundle_id: of the bundle that embedded them.
        embeddings: unit rows `[n, dim]`, float32 or float16.
        paths, names: of the n files.
        identities, cameras: integers `[n]`; UNKNOWN (-2) where a name gives none.
    """

    bundle_id: str
    embeddings: np.ndarray
    paths: list[Path]
    names: list[str]
    identities: np.ndarray
    cameras: np.ndarray

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        bundle: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        *,
        allow_unproven: bool = False,
    ) -> Queries:
        """Of an embedding store, or of an image or a folder of images that a bundle embeds.

        Args:
            source: a store's folder, an image file or a folder of images.
            bundle, backend, allow_unproven: what embeds images, as in `Embedder.open`; a store needs none.

        Raises:
            UserError: images without a bundle, or what `Store.open`, `Embedder.open` and `of_images` refuse.
        """
        if (Path(source) / MANIFEST).is_file():
            return cls.of_store(Store.open(source))
        if bundle is None:
            raise UserError(
                f"{os.fspath(source)} is no embedding store: give --bundle to search for an image or a folder of images"
            )
        return cls.of_images(source, Embedder.open(bundle, backend, allow_unproven=allow_unproven))

    @classmethod
    def of_store(cls, store: Store) -> Queries:
        """Every embedded image of a store."""
        return cls(
            store.manifest.bundle_id,
            store.embeddings(),
            [store.path(row) for row in store],
            [row.name for row in store],
            store.identities(),
            store.cameras(),
        )

    @classmethod
    def of_images(cls, source: str | os.PathLike[str], embedder: Embedder, *, batch_size: int = 8) -> Queries:
        """Embed one image, or every image below a folder.

        Raises:
            UserError: an image cannot be read; the folder is missing or holds none.
        """
        source = Path(source)
        files = [(file.path, file.name) for file in list_images(source)] if source.is_dir() else [(source, source.name)]
        labels = [parse_name(path.name) for path, _ in files]
        return cls(
            embedder.bundle.id,
            embedder.embed([path for path, _ in files], batch_size=batch_size),
            [path for path, _ in files],
            [name for _, name in files],
            np.array([label.identity if label else UNKNOWN for label in labels]),
            np.array([label.camera if label else UNKNOWN for label in labels]),
        )


def search(queries: Queries, gallery: Store, k: int = 10) -> list[RankList]:
    """The k nearest gallery images of each query, best first.

    Left out, as in the Market-1501 protocol: junk (identity -1), and images of the query's identity by the query's
    camera where the names tell both. The query's own file is left out too.

    Args:
        queries: what to look for.
        gallery: where to look.
        k: most results a query.

    Raises:
        UserError: the two were embedded by different bundles, or one of them is empty.
    """
    check_same_bundle(queries.bundle_id, gallery)
    if not len(gallery) or not len(queries.embeddings):
        raise UserError(f"{gallery.folder if not len(gallery) else 'the query side'} holds no embedded image")
    identities, cameras = gallery.identities(), gallery.cameras()
    paths = [gallery.path(row) for row in gallery]
    excluded = _exclusion(queries, identities, cameras, paths)
    indices, similarities = top_k(queries.embeddings, gallery.embeddings(), k, excluded=excluded)
    lists = []
    for query, (row_indices, row_similarities) in enumerate(zip(indices, similarities, strict=True)):
        results = [
            _ranked(paths[index], gallery.rows[index].name, float(similarity), identities[index], cameras[index])
            for index, similarity in zip(row_indices, row_similarities, strict=True)
            if index >= 0
        ]
        asked = _ranked(
            queries.paths[query], queries.names[query], None, queries.identities[query], queries.cameras[query]
        )
        lists.append(RankList(asked, results))
    return lists


def write_store_distances(
    query: Store,
    gallery: Store,
    out: str | os.PathLike[str],
    metric: Metric = "cosine",
    *,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write the distances between two stores' embeddings, in the order of their rows, to a `.npy` file.

    Args:
        query: the matrix's rows.
        gallery: the matrix's columns.
        out: the file, float32 `[len(query), len(gallery)]`.
        metric: cosine is 1 - similarity.
        progress: called with the distances done and to do.

    Returns:
        The matrix's shape.

    Raises:
        UserError: the two were embedded by different bundles, one of them is empty, or the file cannot be written.
    """
    check_same_bundle(query.manifest.bundle_id, gallery)
    write_distance_matrix(Path(out), query.embeddings(), gallery.embeddings(), metric, progress=progress)
    return len(query), len(gallery)


def check_same_bundle(bundle_id: str, gallery: Store) -> None:
    """Raise UserError where embeddings of two bundles would be compared."""
    if bundle_id != gallery.manifest.bundle_id:
        raise UserError(
            f"{gallery.folder} was embedded by bundle {gallery.manifest.bundle_id[:12]} and the queries by "
            f"{bundle_id[:12]}: their embeddings cannot be compared; embed both with one bundle"
        )


def _exclusion(
    queries: Queries, identities: np.ndarray, cameras: np.ndarray, paths: list[Path]
) -> Callable[[slice], np.ndarray]:
    """For some rows of the queries, the gallery images to leave out: bool `[rows, len(gallery)]`."""
    own_files: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        own_files.setdefault(os.path.abspath(path), []).append(index)

    def excluded(rows: slice) -> np.ndarray:
        identity, camera = queries.identities[rows, None], queries.cameras[rows, None]
        mask = (identity == identities) & (camera == cameras) & (identity != UNKNOWN) & (identity != DISTRACTOR)
        mask |= identities == JUNK
        for row, path in enumerate(queries.paths[rows]):
            mask[row, own_files.get(os.path.abspath(path), [])] = True
        return mask

    return excluded


def _ranked(path: Path, name: str, similarity: float | None, identity: int, camera: int) -> RankedImage:
    return RankedImage(
        path,
        name,
        similarity,
        None if identity == UNKNOWN else int(identity),
        None if camera == UNKNOWN else int(camera),
    )
