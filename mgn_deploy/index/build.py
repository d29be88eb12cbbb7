"""Build an index of a store, and open one for searching."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from mgn_deploy.choices import IndexKind
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.index import milvus
from mgn_deploy.index.faiss_folder import FaissIndex, build_faiss
from mgn_deploy.index.manifest import IndexManifest
from mgn_deploy.index.milvus_client import is_milvus
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.nearest import Candidates

_log = logging.getLogger("mgn_deploy")
FLAT_ROWS = 50_000  # `auto` builds flat up to so many rows,
HNSW_ROWS = 200_000  # and hnsw, which holds every embedding in memory and is slow to build, up to so many


def build_index(
    store: Store,
    out: str | os.PathLike[str],
    kind: IndexKind = "auto",
    *,
    recall: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> IndexManifest:
    """Build an index of a store and measure it: recall@10 against exact search for a seeded sample of rows.

    Args:
        store: what is indexed.
        out: the folder of a FAISS index, or `file.db` or `http://host:19530` of Milvus.
        kind: auto is milvus where `out` is, else flat, hnsw or ivf-pq by the number of rows.
        recall: the least recall@10, 0 to 1.
        seed: of the sample and of what ivf-pq is trained on.
        progress: called with the rows that are indexed.

    Raises:
        GateFailed: the recall is not reached; no folder is written, and a Milvus index stays unfinished.
        UserError: an empty store, embeddings that are not finite, no such kind, or what cannot be written or reached.
    """
    if not len(store):
        raise UserError(f"{store.folder} holds no embedded image: there is nothing to index")
    if not 0 <= recall <= 1:
        raise UserError(f"--recall {recall:g}: give a share from 0 to 1")
    if kind not in get_args(IndexKind):
        raise UserError(f"--kind {kind}: choose one of {', '.join(get_args(IndexKind))}")
    target = os.fspath(out)
    if kind == "auto" and is_milvus(target):
        kind = "milvus"
    if (kind == "milvus") != is_milvus(target):
        raise UserError(
            f"--kind {kind} into {target}: Milvus takes a name that ends with .db or http://HOST:PORT, FAISS a folder"
        )
    if kind == "milvus":
        with milvus.opened(target, store, create=True) as index:
            return index.build(recall, seed, progress)
    if kind == "auto":
        kind = "flat" if len(store) <= FLAT_ROWS else "hnsw" if len(store) <= HNSW_ROWS else "ivf-pq"
        _log.info(f"{len(store):,} rows: building {kind}")
    return build_faiss(store, Path(out), kind, recall=recall, seed=seed, progress=progress)


@contextmanager
def open_index(
    index: str | os.PathLike[str],
    store: Store,
    *,
    camera: int | None = None,
    since: float | None = None,
    until: float | None = None,
) -> Iterator[Candidates]:
    """Open an index of a store for `search(..., candidates=...)`.

    Args:
        index: the folder, or the Milvus database.
        store: what it has to be of.
        camera: where given, only rows of this camera are found.
        since, until: where given, only rows of videos are found, from and up to these seconds of their video.

    Raises:
        UserError: no index, a damaged one, one of another store or bundle or of the store before it changed, Milvus
            that cannot be reached; no row of that camera or time.
    """
    rows = _rows_of(store, camera, since, until)
    target = os.fspath(index)
    if is_milvus(target):
        with milvus.opened(target, store) as connected:
            connected.check()
            yield partial(connected.candidates, camera=camera, since=since, until=until)
    else:
        yield partial(FaissIndex.open(Path(target), store).candidates, only=rows)


def _rows_of(store: Store, camera: int | None, since: float | None, until: float | None) -> np.ndarray | None:
    """Numbers of the rows of a camera and time; None: of all."""
    chosen = np.ones(len(store), bool)
    if camera is not None:
        chosen &= store.cameras() == camera
        if not chosen.any():
            raise UserError(f"{store.folder} holds no image by camera {camera}")
    if since is not None or until is not None:
        times = np.array([np.nan if row.time_s is None else row.time_s for row in store])
        if np.isnan(times).all():
            raise UserError(f"{store.folder} holds no image with a time: only rows of videos have one")
        chosen &= (times >= (-np.inf if since is None else since)) & (times <= (np.inf if until is None else until))
        if not chosen.any():
            by = "" if camera is None else f" by camera {camera}"
            raise UserError(
                f"{store.folder} holds no image{by} of that time: its rows are of {np.nanmin(times):g} to "
                f"{np.nanmax(times):g} seconds"
            )
    return None if chosen.all() else np.flatnonzero(chosen)
