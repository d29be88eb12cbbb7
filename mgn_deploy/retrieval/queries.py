"""Images to look for: of a store, or embedded for it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.datasets.labels import Labels, read_labels
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.manifest import MANIFEST, folder_of
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.images.listing import list_images

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Queries:
    """Images to look for.

    Attributes:
        bundle_id: of the bundle that embedded them.
        embeddings: unit rows `[n, dim]`, float32 or float16.
        paths, names: of the n files.
        identities, cameras: integers `[n]`; UNKNOWN (-2) where no label gives one.
        store: whose embedded images they are; None: they are files.
    """

    bundle_id: str
    embeddings: np.ndarray
    paths: list[Path]
    names: list[str]
    identities: np.ndarray
    cameras: np.ndarray
    store: Store | None = None

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        bundle: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        *,
        allow_unproven: bool = False,
        labels: str | os.PathLike[str] = "none",
        gallery: Store | None = None,
    ) -> Queries:
        """Of an embedding store, or of an image or a folder of images that a bundle embeds.

        Args:
            source: a store's folder, an image file or a folder of images.
            bundle, backend, allow_unproven: what embeds images, as in `Embedder.open`; a store needs none.
            labels: who is on images, as in `datasets.labels.read_labels`: none, market1501, or a table with the
                gallery's own numbers of people; a store's rows have labels of their own.
            gallery: the store that is searched; without `bundle` images are embedded by the one that it names.

        Raises:
            UserError: images without a bundle, or what `Store.open`, `Embedder.open` and `of_images` refuse.
        """
        if (Path(source) / MANIFEST).is_file():
            if labels != "none":
                _log.warning(
                    f"--labels {os.fspath(labels)} is not read: {os.fspath(source)} is a store, whose rows have labels "
                    "of their own"
                )
            return cls.of_store(Store.open(source))
        opened: Bundle | str | os.PathLike[str]
        if bundle is not None:
            opened = bundle
        elif gallery is not None:
            opened = gallery.find_bundle()
            _log.info(f"embedding the queries by the gallery's bundle, {opened.folder}")
        else:
            raise UserError(
                f"{os.fspath(source)} is no embedding store: give --bundle to search for an image or a folder of images"
            )
        return cls.of_images(source, Embedder.open(opened, backend, allow_unproven=allow_unproven), labels=labels)

    @classmethod
    def of_store(cls, store: Store) -> Queries:
        """Every embedded image of a store."""
        return cls(
            store.manifest.bundle_id,
            store.embeddings(),
            [path_of(store, row) for row in store],
            [row.name for row in store],
            store.identities(),
            store.cameras(),
            store,
        )

    @classmethod
    def of_images(
        cls,
        source: str | os.PathLike[str],
        embedder: Embedder,
        *,
        batch_size: int = 8,
        labels: str | os.PathLike[str] = "none",
    ) -> Queries:
        """Embed one image, or every image below a folder.

        Raises:
            UserError: an image cannot be read; the folder is missing or holds none; labels that are no rule, or that
                number people by themselves.
        """
        source = Path(source)
        names = [file.name for file in list_images(source)] if source.is_dir() else [source.name]
        paths = [source / name for name in names] if source.is_dir() else [source]
        rule = read_labels(labels, names)
        if rule.people:
            raise UserError(
                f"--labels {os.fspath(labels)} numbers the people of these images anew, and the gallery's have other "
                "numbers: give a table of the gallery's own numbers, or embed the queries into a store with its labels"
            )
        rule.unlabelled(names)
        return cls(
            embedder.bundle.id,
            embedder.embed(paths, batch_size=batch_size),
            paths,
            names,
            *_label_arrays(rule, names),
        )


def _label_arrays(rule: Labels, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Identities and cameras, int64 `[n]` each; UNKNOWN where the rule gives none."""
    labels = [rule(name) for name in names]
    return (
        np.array([label.identity if label else UNKNOWN for label in labels], np.int64),
        np.array([UNKNOWN if label is None or label.camera is None else label.camera for label in labels], np.int64),
    )


def path_of(store: Store, row: Row) -> Path:
    """Where the image is; of a source that is no folder of this machine a name by which nothing is found here."""
    source = store.manifest.source
    return store.path(row) if folder_of(source) else Path(f"{source}/{row.name}")
