"""Image files of people, embedded."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import image_paths
from mgn_deploy.progress import Progress

_CHUNK = 256  # images whose pixels are in memory at a time
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class EmbeddedImages:
    """Images that were embedded, and those that could not be read.

    Attributes:
        paths: of the `n` embedded files.
        embeddings: unit rows float32 `[n, dim]`.
        failed: path and reason of each file that could not be read.
        skipped: how many files of the folders are no image, by extension.
    """

    paths: list[Path]
    embeddings: np.ndarray
    failed: list[tuple[Path, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def embed_readable(
    sources: Sequence[str | os.PathLike[str]],
    embedder: Embedder,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> EmbeddedImages:
    """Embed the images of a list of files and folders; those that cannot be read are logged and left out.

    Raises:
        UserError: not one of them can be read, or what `image_paths` refuses.
    """
    skipped = Counter[str]()
    paths = image_paths(sources, skipped)
    read: list[Path] = []
    failed: list[tuple[Path, str]] = []
    rows: list[np.ndarray] = []
    for start in range(0, len(paths), _CHUNK):
        crops = []
        for path in paths[start : start + _CHUNK]:
            try:
                crops.append(read_crop(path, embedder.height, embedder.width))
                read.append(path)
            except UnreadableImage as error:
                failed.append((path, str(error)))
                _log.warning(f"cannot be read: {str(path)!r}: {error}")
        if crops:
            rows.append(embedder.embed(crops, batch_size=batch_size))
        if progress:
            progress("embedding", min(start + _CHUNK, len(paths)), len(paths))
    if not read:
        path, reason = failed[0]
        raise UserError(f"not one of {len(paths)} images can be read; the first, {str(path)!r}: {reason}")
    return EmbeddedImages(read, np.concatenate(rows), failed, skipped)
