"""Accuracy by the Market-1501 protocol, a backend's beside the PyTorch reference's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.market1501 import LabelledImage, Market1501, open_market1501
from mgn_deploy.ranking import RankingMetrics, evaluate_embeddings

# Called with the step's name, images done, images to do.
StepProgress = Callable[[str, int, int], None]

KEYS = ("rank-1", "rank-5", "rank-10", "mAP", "mINP")


@dataclass(frozen=True)
class Validation:
    """`measured` of a backend, and of the reference where that was asked for. Fractions, 0 to 1."""

    backend: str
    measured: RankingMetrics
    reference: RankingMetrics | None

    def differences(self) -> dict[str, float]:
        """Backend minus reference of every metric, as fractions; empty without a reference."""
        if self.reference is None:
            return {}
        measured, reference = self.measured.to_dict(), self.reference.to_dict()
        return {key: measured[key] - reference[key] for key in KEYS}

    def worst(self) -> float:
        """The largest absolute difference of rank-1 or mAP, as a fraction."""
        differences = self.differences()
        return max(abs(differences[key]) for key in ("rank-1", "mAP")) if differences else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "measured": self.measured.to_dict(),
            "reference": self.reference.to_dict() if self.reference else None,
            "difference": self.differences() or None,
        }


def open_data(spec: str, subsets: tuple[str, ...] = ("query", "gallery")) -> Market1501:
    """The wanted subsets of the dataset of a `--data` argument, `market1501:DIR`.

    Raises:
        UserError: no such kind of dataset, or a folder that is not one.
    """
    kind, _, folder = spec.partition(":")
    if kind != "market1501" or not folder:
        raise UserError(
            f"--data {spec}: give market1501:DIR, DIR holding bounding_box_train, query and bounding_box_test"
        )
    return open_market1501(os.path.expanduser(folder), subsets=subsets)


def validate(
    data: Market1501,
    embedder: Embedder,
    reference: Embedder | None,
    *,
    batch_size: int = 8,
    progress: StepProgress | None = None,
) -> Validation:
    """Embed query and gallery with both, and rank.

    Raises:
        UserError: an image cannot be read, or no query has a right answer.
    """
    measured = _measure(data, embedder, batch_size, embedder.backend.name, progress)
    expected = _measure(data, reference, batch_size, "PyTorch reference", progress) if reference else None
    return Validation(embedder.backend.name, measured, expected)


def _measure(
    data: Market1501, embedder: Embedder, batch_size: int, label: str, progress: StepProgress | None
) -> RankingMetrics:
    def embed(images: list[LabelledImage], before: int) -> Any:
        total = len(data.query) + len(data.gallery)
        update = (lambda done, _: progress(label, before + done, total)) if progress else None
        return embedder.embed([image.path for image in images], batch_size=batch_size, progress=update)

    return evaluate_embeddings(
        embed(data.query, 0),
        embed(data.gallery, len(data.query)),
        [image.identity for image in data.query],
        [image.camera for image in data.query],
        [image.identity for image in data.gallery],
        [image.camera for image in data.gallery],
    )
