"""Embeddings of people who are random directions, each image a noisy copy."""

from __future__ import annotations

import numpy as np

from mgn_deploy.identity.calibrate_embeddings import calibrate_embeddings
from mgn_deploy.identity.calibration import Calibration

BUNDLE = "a" * 64


def embeddings_of(
    people: int, images: int = 8, *, dim: int = 32, noise: float = 1.0, cameras: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows float32 `[people * images, dim]`, each row's person and its camera."""
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(people), images)
    rows = generator.normal(size=(people, dim))[owners] + noise * generator.normal(size=(len(owners), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), owners, np.arange(len(owners)) % cameras


def calibrated(people: int = 60, *, bundle_id: str = BUNDLE, **options: object) -> Calibration:
    """A calibration on made-up people."""
    data = {name: options.pop(name) for name in ("images", "noise", "cameras", "seed") if name in options}
    return calibrate_embeddings(
        *embeddings_of(people, **data),  # type: ignore[arg-type]
        **{"bundle_id": bundle_id, "backend": "onnxruntime", "source": "made up", "replicates": 20, **options},  # type: ignore[arg-type]
    )
