"""Accuracy by the Market-1501 protocol, a backend's beside the PyTorch reference's."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.choices import DEFAULT_TOLERANCE, QueryPooling
from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.evaluation import Protocol, Scores, query_notes, score_embeddings, write_per_query
from mgn_deploy.retrieval.multi_query import needed_subsets, pool_queries, views_of_queries
from mgn_deploy.retrieval.ranking import NO_ANSWER, RankingMetrics
from mgn_deploy.retrieval.statistics import Difference, compare
from mgn_deploy.retrieval.truth import Truth

_log = logging.getLogger("mgn_deploy")

KEYS = ("rank-1", "rank-5", "rank-10", "mAP", "mINP")


@dataclass(frozen=True)
class Validation:
    """A backend's accuracy, and the PyTorch reference's where that was asked for. Fractions, 0 to 1.

    Attributes:
        backend: the engine's name.
        measured, reference: rank-k, mAP and mINP.
        measured_scores, reference_scores: these and whatever else the protocol asks for.
        notes: sentences about queries that no figure is about.
        unmatched: the names of the queries without a right answer.
        embeddings: the engine's, of queries `[q, d]` and gallery `[g, d]`.
    """

    backend: str
    measured: RankingMetrics
    reference: RankingMetrics | None
    measured_scores: Scores | None = None
    reference_scores: Scores | None = None
    notes: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    embeddings: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)

    def differences(self) -> dict[str, float]:
        """Backend minus reference of every metric, as fractions; empty without a reference."""
        if self.reference is None:
            return {}
        measured, reference = self.measured.to_dict(), self.reference.to_dict()
        return {key: measured[key] - reference[key] for key in KEYS}

    def paired(self) -> dict[str, Difference]:
        """The differences query by query, each with its interval and p-value; empty without a reference."""
        if self.reference is None or self.measured.scores is None or self.reference.scores is None:
            return {}
        return compare(self.measured.scores, self.reference.scores)

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
        """JSON-ready, with the keys backend, measured, reference, difference, paired_test and unmatched_queries; those
        that need a reference may be None."""
        measured = self.measured_scores or Scores(self.measured)
        reference = self.reference_scores or (Scores(self.reference) if self.reference else None)
        return {
            "backend": self.backend,
            "measured": measured.to_dict(),
            "reference": reference.to_dict() if reference else None,
            "difference": self.differences() or None,
            "paired_test": {key: one.to_dict() for key, one in self.paired().items()} or None,
            "unmatched_queries": self.unmatched,
        }


def validate(
    data: Dataset,
    embedder: Embedder,
    reference: Embedder | None,
    *,
    multi_query: QueryPooling | None = None,
    protocol: Protocol | None = None,
    per_query: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Validation:
    """Embed query and gallery with an engine and, beside it, with the reference, and score both rankings.

    Args:
        data: its query and gallery subsets and, for `multi_query`, that one.
        embedder: the engine.
        reference: of `Embedder.open_reference`; None: the engine alone.
        multi_query: avg or max, to pool each query with `data.multi_query`'s images of its person and camera.
        protocol: how the gallery is ranked and what is measured; by default that of Market-1501.
        per_query: a Parquet file to write, with one row a query (`write_per_query`).
        batch_size: images an engine call.
        progress: called after each batch with the images done and to do, once for each of the two.

    Raises:
        UserError: an image cannot be read, no query has a right answer, or nothing to pool.
    """
    needed_subsets(multi_query)  # refuses what is no pooling before hours of embedding
    protocol = protocol or Protocol()
    protocol = replace(
        protocol, device=Arrays.open(protocol.device)
    )  # refuses what is not there, as the next line does
    if per_query is not None and (not Path(per_query).parent.is_dir() or Path(per_query).is_dir()):
        raise UserError(f"--per-query {os.fspath(per_query)}: give the name of a file in a folder that exists")
    truth = Truth.of_dataset(data, cameras=protocol.cameras)
    names = [_name(image, data) for image in data.query]
    unmatched = [names[row] for row in truth.unmatched()]
    if len(unmatched) == len(names):
        raise UserError(NO_ANSWER)  # before hours of embedding
    notes = query_notes(names, truth)
    for note in notes:
        _log.warning(note)

    def measure(embedder: Embedder, label: str) -> tuple[Scores, tuple[np.ndarray, np.ndarray]]:
        query, gallery = _measure(data, embedder, multi_query, batch_size, label, progress)
        return score_embeddings(query, gallery, truth, protocol, progress=progress), (query, gallery)

    measured, embeddings = measure(embedder, embedder.backend.name)
    expected = measure(reference, "PyTorch reference")[0] if reference else None
    if per_query is not None:
        of_each = {
            "": measured.metrics.scores,
            "reranked_": measured.reranked.scores if measured.reranked else None,
            "reference_": expected.metrics.scores if expected else None,
        }
        write_per_query(per_query, names, truth.query_identities, of_each)
    return Validation(
        embedder.backend.name,
        measured.metrics,
        expected.metrics if expected else None,
        measured,
        expected,
        notes,
        [names[row] for row in truth.unmatched()],
        embeddings,
    )


def _measure(
    data: Dataset,
    embedder: Embedder,
    multi_query: QueryPooling | None,
    batch_size: int,
    label: str,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings of queries and gallery."""
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
    return queries, embed(data.gallery, len(data.query) + len(views))


def rank_gallery(data: Dataset, query: np.ndarray, gallery: np.ndarray) -> RankingMetrics:
    """Score the embeddings `[q, d]` and `[g, d]` of `data.query` and `data.gallery`."""
    return score_embeddings(query, gallery, Truth.of_dataset(data)).metrics


def _name(image: LabelledImage, data: Dataset) -> str:
    """Of a query, below the data set's folder."""
    return image.path.relative_to(data.root).as_posix() if image.path.is_relative_to(data.root) else str(image.path)
