"""Stores of drawn crops with given embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.gallery.manifest import StoreManifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import Store
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.retrieval.rank_list import RankList

Labelled = list[tuple[str, int | None, int | None]]  # name, identity, camera


def made_up_store(
    folder: Path,
    embeddings: np.ndarray,
    identities: list[int | None],
    cameras: list[int | None] | None = None,
    *,
    names: list[str] | None = None,
    times: list[float | None] | None = None,
    drawn: bool = False,
    bundle_id: str = "b" * 64,
) -> Store:
    """A store at `folder`/store of images below `folder`/images, which are drawn or not there at all."""
    names = names or [f"{number}.jpg" for number in range(len(embeddings))]
    cameras = cameras or [None] * len(embeddings)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if drawn:
        for name, identity, camera in zip(names, identities, cameras, strict=True):
            draw_crop(identity or 0, camera or 1, len(name)).save(folder / "images" / name, "JPEG")
    rows = [
        Row(name, 1, 1, None, identity, camera, time_s=time_s)
        for name, identity, camera, time_s in zip(
            names, identities, cameras, times or [None] * len(embeddings), strict=True
        )
    ]
    return write_rows(folder / "store", rows, embeddings, bundle_id)


def write_store(
    folder: Path,
    rows: Labelled,
    embeddings: np.ndarray,
    bundle_id: str = "b" * 64,
    source: str = "images",
) -> Store:
    """A store of images that need not exist; `source` is a URI, or a folder beside the store."""
    return write_rows(folder, [Row(name, 1, 1, None, *labels) for name, *labels in rows], embeddings, bundle_id, source)


def write_rows(
    folder: Path, rows: list[Row], embeddings: np.ndarray, bundle_id: str = "b" * 64, source: str = "images"
) -> Store:
    manifest = StoreManifest(
        bundle_id=bundle_id,
        backend="onnxruntime",
        preprocessing="pillow-bicubic-1",
        dim=embeddings.shape[1],
        dtype="float32",
        source=source if ":" in source else (folder.parent / source).as_uri(),
    )
    with StoreWriter(folder, manifest) as writer:
        writer.add(rows, embeddings.astype(np.float32))
    return Store.open(folder)


def names(ranked: RankList) -> list[str]:
    return [result.name for result in ranked.results]
