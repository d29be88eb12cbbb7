"""Who appears where, without labels: images grouped by DBSCAN (Ester et al., KDD 1996)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgn_deploy.choices import ClusterDistance
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, printable
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.packages import require
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.encodings import encode
from mgn_deploy.retrieval.rows import check_finite, slices

NOBODY = -1  # the cluster of an image that is in none
MIN_IMAGES = 2
# Where images of one person end, measured on CUHK03's people: docs/decisions/057.
EPS: dict[ClusterDistance, float] = {"jaccard": 0.4, "cosine": 0.08}
_ROWS = 256  # whose distances to all are in memory at a time


@dataclass(frozen=True)
class Agreement:
    """How far clusters agree with the people that labels name; an image in no cluster is one by itself.

    Attributes:
        images, people: labelled ones.
        ari: adjusted Rand index (Hubert and Arabie 1985); 0 for chance, 1 for equal.
        nmi: mutual information divided by the mean of the two entropies; 1 for equal.
        precision, recall, f1: of pairs: two images of one cluster are of one person, and the other way round.
    """

    images: int
    people: int
    ari: float
    nmi: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Clusters:
    """Images in groups.

    Attributes:
        store: whose rows they are.
        labels: int64 `[len(store)]`; clusters from 0 on, the largest first, NOBODY (-1) for images in none.
        distance, eps, min_images: how they were made.
        agreement: with the store's labels; None where fewer than two images have one.
    """

    store: Store
    labels: np.ndarray
    distance: ClusterDistance
    eps: float
    min_images: int
    agreement: Agreement | None

    def __len__(self) -> int:
        return int(self.labels.max(initial=NOBODY)) + 1

    def members(self, cluster: int) -> list[int]:
        """The rows of a cluster, or with NOBODY those in none."""
        return np.flatnonzero(self.labels == cluster).tolist()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, not rows."""
        sizes = np.bincount(self.labels[self.labels >= 0], minlength=len(self))
        return {
            "images": len(self.labels),
            "clusters": len(self),
            "in_none": int((self.labels == NOBODY).sum()),
            "largest": int(sizes.max(initial=0)),
            "distance": self.distance,
            "eps": self.eps,
            "min_images": self.min_images,
            "agreement": None if self.agreement is None else asdict(self.agreement),
        }


def cluster_store(
    store: Store,
    *,
    distance: ClusterDistance = "jaccard",
    eps: float | None = None,
    min_images: int = MIN_IMAGES,
    progress: Progress | None = None,
) -> Clusters:
    """Group the images of a store by person, as far as their embeddings tell.

    Memory grows with the pairs of images that are nearer than `eps`.

    Args:
        store: with at least two images.
        distance: jaccard, of k-reciprocal encodings (`retrieval/encodings.py`), or cosine.
        eps: how far two images of one person may be, 0 to 1; None: `EPS` of the distance.
        min_images: so many images within `eps` of one, itself among them, begin a cluster.
        progress: called as (step, done, total).

    Raises:
        CannotRun: scikit-learn is not installed.
        UserError: fewer than two images, embeddings that are not finite, or an option out of range.
    """
    if distance not in get_args(ClusterDistance):
        raise UserError(f"no distance {distance!r}: there are {', '.join(get_args(ClusterDistance))}")
    eps = EPS[distance] if eps is None else eps
    if not 0 < eps < 1:
        raise UserError(f"eps is a distance between 0 and 1, and {eps:g} is not")
    if min_images < 2:
        raise UserError(f"a cluster begins with at least 2 images, not {min_images}")
    require("sklearn", "identity", "clusters are made by scikit-learn")
    if len(store) < 2:
        raise UserError(f"{store.folder} holds {len(store)} embedded images: clusters need at least 2")
    embeddings = store.embeddings().astype(np.float32)
    check_finite(str(store.folder), embeddings)
    labels = _dbscan(*_near(embeddings, distance, eps, progress), eps, min_images)
    return Clusters(store, labels, distance, eps, min_images, agreement(store.identities(), labels))


def agreement(identities: np.ndarray, labels: np.ndarray) -> Agreement | None:
    """How far clusters agree with identities, int `[n]` each; None where fewer than two images have an identity."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import pair_confusion_matrix

    known = identities > UNKNOWN + 1  # neither unknown nor junk
    if known.sum() < 2:
        return None
    people, clusters = identities[known], labels[known].copy()
    alone = clusters == NOBODY
    clusters[alone] = clusters.max() + 1 + np.arange(alone.sum())
    (_, together_only), (apart_only, both) = pair_confusion_matrix(people, clusters).tolist()
    precision = both / (both + together_only) if both + together_only else 1.0
    recall = both / (both + apart_only) if both + apart_only else 1.0
    return Agreement(
        int(known.sum()),
        len(np.unique(people)),
        float(adjusted_rand_score(people, clusters)),
        float(normalized_mutual_info_score(people, clusters)),
        precision,
        recall,
        2 * both / (2 * both + together_only + apart_only) if both + together_only + apart_only else 1.0,
    )


def write_clusters(clusters: Clusters, out: str | os.PathLike[str]) -> None:
    """Write a Parquet file with one row an image: path, cluster (-1: none), identity and camera where known.

    Raises:
        UserError: the file cannot be written; an earlier one is kept.
    """
    rows = clusters.store.rows
    table = pa.table(
        {
            "path": pa.array([printable(row.name) for row in rows], pa.string()),
            "cluster": pa.array(clusters.labels, pa.int64()),
            "identity": pa.array([row.identity for row in rows], pa.int64()),
            "camera": pa.array([row.camera for row in rows], pa.int64()),
        }
    )
    with atomic_file(Path(out)) as file:
        pq.write_table(table, file, compression="zstd")


def read_clusters(path: str | os.PathLike[str], store: Store) -> np.ndarray:
    """The cluster of each row of a store, int64 `[len(store)]`, of a file that `write_clusters` wrote for it.

    Raises:
        UserError: no such file, one of something else, or one that lacks an image of the store.
    """
    path = Path(path)
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()), columns=["path", "cluster"], use_threads=False)
        found = dict(zip(table["path"].to_pylist(), table["cluster"].to_pylist(), strict=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (pa.ArrowException, KeyError, ValueError):
        raise UserError(
            f"{path} is not what `mgn-deploy cluster -o` writes, a Parquet file with the columns path and cluster"
        ) from None
    names = [printable(row.name) for row in store]
    missing = [name for name in names if not isinstance(found.get(name), int)]
    if missing:
        raise UserError(f"{path} has no cluster for {missing[0]!r} of {store.folder}: cluster the store again")
    return np.array([found[name] for name in names], np.int64)


def _near(
    embeddings: np.ndarray, distance: ClusterDistance, eps: float, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of images that is at most `eps` apart, by rows: offsets `[n + 1]`, columns, distances."""
    distances_of: Callable[[slice], np.ndarray]
    if distance == "jaccard":
        distances_of = encode(embeddings, progress=progress).jaccard
    else:

        def distances_of(rows: slice) -> np.ndarray:
            return 1 - embeddings[rows] @ embeddings.T

    n = len(embeddings)
    counts, columns, values = [np.zeros(1, np.int64)], [], []
    for rows in slices(n, _ROWS):
        tile = np.maximum(distances_of(rows), 0)
        tile[np.arange(len(tile)), np.arange(rows.start, rows.stop)] = 0  # an image is no distance from itself
        row, column = np.nonzero(tile <= eps)
        counts.append(np.bincount(row, minlength=len(tile)))
        columns.append(column)
        values.append(tile[row, column])
        if progress:
            progress("distances", rows.stop, n)
    return np.cumsum(np.concatenate(counts)), np.concatenate(columns), np.concatenate(values)


def _dbscan(offsets: np.ndarray, columns: np.ndarray, values: np.ndarray, eps: float, min_images: int) -> np.ndarray:
    from scipy.sparse import csr_matrix  # which scikit-learn needs
    from sklearn.cluster import DBSCAN

    n = len(offsets) - 1
    graph = csr_matrix((values, columns, offsets), shape=(n, n))
    found = DBSCAN(eps=eps, min_samples=min_images, metric="precomputed").fit(graph).labels_
    largest_first = np.argsort(-np.bincount(found[found >= 0]), kind="stable")
    rank = np.append(np.argsort(largest_first), NOBODY)  # DBSCAN says -1 of those in none, which is the last one
    return rank[found]


def appearances(clusters: Clusters, cluster: int) -> str:
    """In which cameras a cluster's images are: "camera 1: 3, camera 4: 2"; empty where none is known."""
    cameras = [clusters.store.rows[row].camera for row in clusters.members(cluster)]
    counts = Counter(camera for camera in cameras if camera is not None)
    return ", ".join(f"camera {camera}: {count}" for camera, count in sorted(counts.items()))
