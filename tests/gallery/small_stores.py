"""Stores of rows of four numbers, for the tests of a store's files."""

from __future__ import annotations

import os

import numpy as np
import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.manifest import StoreManifest
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.writer import StoreWriter

MANIFEST = StoreManifest(
    bundle_id="ab" * 32,
    backend="onnxruntime",
    preprocessing="pillow-bicubic-1",
    dim=4,
    dtype="float32",
    source="file:///images",
)


def ok(name: str, **changes: object) -> Row:
    return Row(**{"name": name, "size": 10, "mtime_ns": 20, "error": None, "identity": None, "camera": None, **changes})


def bad(name: str, error: str = "the file is empty") -> Row:
    return ok(name, error=error)


def write(folder, *shards: list[Row], manifest: StoreManifest = MANIFEST) -> np.ndarray:
    """Commit each list of rows with random embeddings; all embeddings in order."""
    parts = [np.empty((0, 4), np.float32)]
    with StoreWriter(folder, manifest) as writer:
        for number, rows in enumerate(shards):
            parts.append(np.random.default_rng(number).standard_normal((len(rows), 4), np.float32))
            parts[-1][[row.error is not None for row in rows]] = np.nan
            writer.add(rows, parts[-1])
    return np.concatenate(parts)


def shard(folder, kind: str, number: int = 0):
    """A shard's file: npy or parquet."""
    [path] = folder.glob(f"shard-{number:05d}-*.{kind}")
    return path


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def enter(folder, manifest: StoreManifest = MANIFEST) -> None:
    with StoreWriter(folder, manifest):
        pass


def names_in(folder) -> list[str]:
    return sorted(os.listdir(folder))
