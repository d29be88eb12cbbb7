"""What the tests of embedding a folder share: how a store is looked at and compared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery import run as gallery_run
from mgn_deploy.gallery.store import Store


def opened_by(kind: type[OnnxRuntimeBackend], bundle: Bundle) -> Embedder:
    """The bundle opened by a backend that a test has changed."""
    return Embedder(kind(bundle.read(GRAPH), bundle.config), bundle.config, bundle)


def names(store: Path) -> list[str]:
    return [row.name for row in Store.open(store).rows]


def failures(store: Path) -> dict[str, str]:
    return {row.name: row.error for row in Store.open(store).failures}


def counts(report: gallery_run.GalleryReport) -> tuple[int, int, int, int]:
    return report.embedded, report.unchanged, len(report.failed), report.gone


def refusal(kind: type[Exception], action, *arguments, **options) -> str:
    with pytest.raises(kind) as refused:
        action(*arguments, **options)
    return str(refused.value)


def assert_rows_are_their_files(store: Path, folder: Path, embedder: Embedder, tolerance: float = 1e-5) -> None:
    opened = Store.open(store)
    for row, embedding in zip(opened.rows, opened.embeddings(), strict=True):
        alone = embedder.embed([folder / row.name])[0]
        assert np.abs(embedding - alone).max() < tolerance, row.name


def assert_same_store(one: Path, other: Path, tolerance: float = 0) -> None:
    """The same files byte for byte; with a tolerance the same rows and nearly the same embeddings."""
    if not tolerance:
        assert sorted(os.listdir(one)) == sorted(os.listdir(other))
        for path in one.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    assert np.abs(Store.open(one).embeddings() - Store.open(other).embeddings()).max() <= tolerance
    assert Store.open(one).rows == Store.open(other).rows
    assert Store.open(one).failures == Store.open(other).failures
