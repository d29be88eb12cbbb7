"""Accuracy by the Market-1501 protocol, a backend's beside the PyTorch reference's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.choices import DEFAULT_TOLERANCE, QueryPooling
from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.multi_query import needed_subsets, pool_queries, views_of_queries
from mgn_deploy.retrieval.ranking import RankingMetrics, evaluate_embeddings

_log = logging.getLogger("mgn_deploy")

KEYS = ("rank-1", "rank-5", "rank-10", "mAP", "mINP")


@dataclass(frozen=True)
class Validation:
    """A backend's accuracy, and the PyTorch reference's where that was asked for. Fractions, 0 to 1."""

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

    def passes(self, tolerance: float = DEFAULT_TOLERANCE) -> bool | None:
        """Whether rank-1 and mAP differ by at most `tolerance` points; None without a reference to differ from."""
        return self.worst() * 100 <= tolerance if self.reference else None

    def require(self, tolerance: float = DEFAULT_TOLERANCE) -> None:
        """Raise GateFailed where rank-1 or mAP differs from the reference's by more than `tolerance` points."""
        if self.passes(tolerance) is False:
            raise GateFailed(
                f"rank-1 or mAP differs by {100 * self.worst():.2f} points from the reference, more than {tolerance}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys backend, measured, reference and difference; the last two may be None."""
        return {
            "backend": self.backend,
            "measured": self.measured.to_dict(),
            "reference": self.reference.to_dict() if self.reference else None,
            "difference": self.differences() or None,
        }


def validate(
    data: Dataset,
    embedder: Embedder,
    reference: Embedder | None,
    *,
    multi_query: QueryPooling | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Validation:
    """Embed query and gallery with an engine and, beside it, with the reference, and score both rankings.

    Args:
        data: its query and gallery subsets and, for `multi_query`, that one.
        embedder: the engine.
        reference: of `Embedder.open_reference`; None: the engine alone.
        multi_query: avg or max, to pool each query with `data.multi_query`'s images of its person and camera.
        batch_size: images an engine call.
        progress: called after each batch with the images done and to do, once for each of the two.

    Raises:
        UserError: an image cannot be read, no query has a right answer, or nothing to pool.
    """
    needed_subsets(multi_query)  # refuses what is no pooling before hours of embedding
    measured = _measure(data, embedder, multi_query, batch_size, embedder.backend.name, progress)
    expected = _measure(data, reference, multi_query, batch_size, "PyTorch reference", progress) if reference else None
    return Validation(embedder.backend.name, measured, expected)


def _measure(
    data: Dataset,
    embedder: Embedder,
    multi_query: QueryPooling | None,
    batch_size: int,
    label: str,
    progress: Progress | None,
) -> RankingMetrics:
    _log.info(
        f"ranking {len(data.query)} queries in {len(data.gallery)} gallery images of {data.root} with {label} on "
        f"{embedder.backend.device}"
    )
    views, members = views_of_queries(data) if multi_query else ([], [])

    def embed(images: list[LabelledImage], before: int) -> Any:
        total = len(data.query) + len(views) + len(data.gallery)
        update = (lambda _, done, __: progress(label, before + done, total)) if progress else None
        return embedder.embed([image.path for image in images], batch_size=batch_size, progress=update)

    queries = embed(data.query, 0)
    if multi_query:
        queries = pool_queries(queries, embed(views, len(data.query)), members, multi_query)
    return rank_gallery(data, queries, embed(data.gallery, len(data.query) + len(views)))


def rank_gallery(data: Dataset, query: np.ndarray, gallery: np.ndarray) -> RankingMetrics:
    """Score the embeddings `[q, d]` and `[g, d]` of `data.query` and `data.gallery`."""
    return evaluate_embeddings(
        query,
        gallery,
        [image.identity for image in data.query],
        [image.camera for image in data.query],
        [image.identity for image in data.gallery],
        [image.camera for image in data.gallery],
    )
