"""Queries against a gallery store: who is nearest."""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from mgn_deploy.choices import Device, Metric
from mgn_deploy.datasets.dataset import JUNK
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.crops import row_crop
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.sources import name_below
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.distance import write_distance_matrix
from mgn_deploy.retrieval.expansion import expand_queries
from mgn_deploy.retrieval.nearest import Candidates, top_k, top_k_of_candidates
from mgn_deploy.retrieval.queries import Queries, path_of
from mgn_deploy.retrieval.rank_list import RankedImage, RankList
from mgn_deploy.retrieval.rerank import rerank_top_k
from mgn_deploy.retrieval.rows import TILE_BYTES

_SOURCE = Row("", None, None, None, None, None)  # whose path is the source itself
_log = logging.getLogger("mgn_deploy")


def search(
    queries: Queries,
    gallery: Store,
    k: int = 10,
    *,
    exclude_same_camera: bool = False,
    rerank: bool = False,
    aqe: int = 0,
    candidates: Candidates | None = None,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> list[RankList]:
    """The k nearest gallery images of each query, best first.

    Only the query's own file is left out unless more is asked for. What was left out is counted in each list and told.

    Args:
        queries: what to look for.
        gallery: where to look.
        k: most results a query.
        exclude_same_camera: leave out, as the Market-1501 protocol does, images of the query's person by the query's
            camera, where labels tell both, and junk (identity -1).
        rerank: by k-reciprocal re-ranking, for which every image of both sides is compared with every other.
        aqe: expand each query by this many of its nearest images first (alpha query expansion); 0: none.
        candidates: of an approximate index (`open_index`), which are re-scored exactly; None: every image is compared.
        device: where re-ranking compares images.
        progress: called with what re-ranking has done and has to do.

    Raises:
        UserError: the two were embedded by different bundles, one of them is empty, k is below 1, or an index is to
            be used for re-ranking or query expansion.
    """
    if candidates is not None and (rerank or aqe):
        raise UserError(
            f"{'--rerank' if rerank else '--aqe'} with --index: it is defined on exact neighbours, and what an "
            "approximate index misses would change its result unseen (mAP likewise): leave out one of the two"
        )
    check_same_bundle(queries.bundle_id, gallery)
    if not len(gallery) or not len(queries.embeddings):
        raise UserError(f"{gallery.folder if not len(gallery) else 'the query side'} holds no embedded image")
    rows = gallery.embeddings() if aqe or rerank else np.empty((0, gallery.manifest.dim), np.float32)
    left_out = _LeftOut(queries, gallery, exclude_same_camera)
    asked = queries.embeddings
    if aqe:
        asked = expand_queries(asked, rows, aqe, excluded=left_out.pairs)
    if rerank:
        indices, distances = rerank_top_k(asked, rows, k, excluded=left_out.mask, device=device, progress=progress)
    elif candidates is not None:
        indices, similarities = top_k_of_candidates(asked, gallery, k, candidates, excluded=left_out.pairs)
    else:
        indices, similarities = top_k(asked, gallery, k, excluded=left_out.pairs)  # block by block
    left_out.tell()
    lists = []
    for query, found in enumerate(indices):
        found = found[found >= 0]
        if rerank:
            mine = np.asarray(asked[query], np.float32)
            near, far = np.asarray(rows[found], np.float32) @ mine, np.maximum(distances[query], 0)
        else:
            near, far = similarities[query], None
        results = []
        for rank, index in enumerate(found.tolist()):
            row = gallery.rows[index]
            results.append(
                RankedImage(
                    path_of(gallery, row),
                    row.name,
                    min(float(near[rank]), 1.0),  # rows in float16 are longer than 1, by rounding
                    row.identity,
                    row.camera,
                    None if far is None else float(far[rank]),
                    load=partial(row_crop, gallery, row),
                )
            )
        identity, camera = (
            None if labels[query] == UNKNOWN else int(labels[query]) for labels in (queries.identities, queries.cameras)
        )
        load = partial(row_crop, queries.store, queries.store.rows[query]) if queries.store else None
        asking = RankedImage(queries.paths[query], queries.names[query], None, identity, camera, load=load)
        lists.append(RankList(asking, results, left_out.counts(query)))
    return lists


def write_store_distances(
    query: Store,
    gallery: Store,
    out: str | os.PathLike[str],
    metric: Metric = "cosine",
    *,
    tile_bytes: int = TILE_BYTES,
    device: Device | Arrays = "cpu",
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write the distances between two stores' embeddings, in the order of their rows, to a `.npy` file.

    Args:
        query: the matrix's rows.
        gallery: the matrix's columns.
        out: the file, float32 `[len(query), len(gallery)]`.
        metric: cosine is 1 - similarity.
        tile_bytes: of memory beyond the embeddings.
        device: where they are computed.
        progress: called with the distances done and to do.

    Returns:
        The matrix's shape.

    Raises:
        UserError: the two were embedded by different bundles, one of them is empty, or the file cannot be written.
    """
    check_same_bundle(query.manifest.bundle_id, gallery)
    write_distance_matrix(
        Path(out),
        query.embeddings(),
        gallery.embeddings(),
        metric,
        tile_bytes=tile_bytes,
        device=device,
        progress=progress,
    )
    return len(query), len(gallery)


def check_same_bundle(bundle_id: str, gallery: Store) -> None:
    """Raise UserError where embeddings of two bundles would be compared."""
    if bundle_id != gallery.manifest.bundle_id:
        raise UserError(
            f"{gallery.folder} was embedded by bundle {gallery.manifest.bundle_id[:12]} and the queries by "
            f"{bundle_id[:12]}: their embeddings cannot be compared; embed both with one bundle"
        )


class _LeftOut:
    """The gallery images that each query must not get, by reason."""

    def __init__(self, queries: Queries, gallery: Store, exclude_same_camera: bool) -> None:
        self._gallery = len(gallery)
        source = os.path.abspath(path_of(gallery, _SOURCE))
        names = [name_below(os.path.abspath(path), source) for path in queries.paths]
        wanted = set(names)  # of a gallery of a million images neither paths nor a table of all are made
        own = {row.name: index for index, row in enumerate(gallery) if row.name in wanted}
        self._rows: list[dict[str, list[int]]] = [{"own_file": [own[name]] if name in own else []} for name in names]
        if exclude_same_camera:
            shots: dict[tuple[int | None, int | None], list[int]] = {}
            for index, row in enumerate(gallery):
                shots.setdefault((row.identity, row.camera), []).append(index)
            junk = [index for (identity, _), of in shots.items() if identity == JUNK for index in of]
            asked = zip(queries.identities.tolist(), queries.cameras.tolist(), strict=True)
            for rows, shot in zip(self._rows, asked, strict=True):
                rows["same_camera"] = [] if shot[0] == JUNK else shots.get(shot, [])
                rows["junk"] = junk

    def counts(self, query: int) -> dict[str, int]:
        """How many were left out for one query; an image that two reasons name counts once, for the first."""
        seen: set[int] = set()
        counts = {}
        for reason, rows in self._rows[query].items():
            counts[reason] = len(set(rows) - seen)
            seen.update(rows)
        return counts

    def tell(self) -> None:
        """Say how many images were left out in all, and why."""
        total = Counter[str]()
        for query in range(len(self._rows)):
            total.update(self.counts(query))
        words = {"own_file": "the query's own file", "same_camera": "same person and camera", "junk": "junk"}
        told = [f"{words[reason]}: {count:,}" for reason, count in total.items() if count]
        if told:
            _log.info(f"left out of the results ({'; '.join(told)}), over {len(self._rows):,} queries")

    def pairs(self, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """(query within the slice, gallery row) of all that is left out."""
        members = [sorted({row for rows in of.values() for row in rows}) for of in self._rows[queries]]
        lengths = [len(rows) for rows in members]
        return np.repeat(np.arange(len(members)), lengths), np.array(
            [row for rows in members for row in rows], np.int64
        )

    def mask(self, queries: slice) -> np.ndarray:
        """The same as bool `[queries, gallery]`."""
        row, column = self.pairs(queries)
        mask = np.zeros((len(self._rows[queries]), self._gallery), bool)
        mask[row, column] = True
        return mask
