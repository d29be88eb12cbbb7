"""Accuracy by the Market-1501 protocol, a backend's beside the PyTorch reference's."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.choices import DEFAULT_TOLERANCE, QueryPooling
from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.files import cache_folder, sha256_bytes
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.sources import files_source
from mgn_deploy.gallery.store import Store
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.evaluation import Protocol, Scores, query_notes, score_embeddings, write_per_query
from mgn_deploy.retrieval.multi_query import needed_subsets, pool_queries, views_of_queries
from mgn_deploy.retrieval.ranking import KEYS, NO_ANSWER, RankingMetrics
from mgn_deploy.retrieval.statistics import Difference
from mgn_deploy.retrieval.truth import Truth

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Validation:
    """A backend's accuracy, and the PyTorch reference's where that was asked for. Fractions, 0 to 1.

    Attributes:
        backend: the engine's name.
        measured_scores, reference_scores: rank-k, mAP, mINP, and whatever else the protocol asks for.
        notes: sentences about queries that no figure is about.
        unmatched: the names of the queries without a right answer.
        embeddings: the engine's, of queries `[q, d]` and gallery `[g, d]`.
        ranked: the data set without junk, in the order of `embeddings`.
        sample: the engine beside the reference on a part of the data set, where only that was asked for.
    """

    backend: str
    measured_scores: Scores
    reference_scores: Scores | None = None
    notes: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    embeddings: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    ranked: Dataset | None = field(default=None, repr=False)
    sample: Validation | None = None

    @property
    def measured(self) -> RankingMetrics:
        """The engine's rank-k, mAP and mINP."""
        return self.measured_scores.metrics

    @property
    def reference(self) -> RankingMetrics | None:
        """The reference's."""
        return None if self.reference_scores is None else self.reference_scores.metrics

    def differences(self) -> dict[str, float]:
        """Backend minus reference of every metric, as fractions; empty without a reference."""
        if self.sample:
            return self.sample.differences()
        if self.reference is None:
            return {}
        measured, reference = self.measured.to_dict(), self.reference.to_dict()
        return {key: measured[key] - reference[key] for key in KEYS}

    def paired(self) -> dict[str, Difference]:
        """The differences query by query, each with its interval and p-value; empty without a reference."""
        if self.sample:
            return self.sample.paired()
        return self.measured_scores.paired(self.reference_scores)

    def worst(self) -> float:
        """The largest absolute difference of rank-1 or mAP, as a fraction."""
        differences = self.differences()
        return max(abs(differences[key]) for key in ("rank-1", "mAP")) if differences else 0.0

    def passes(self, tolerance: float = DEFAULT_TOLERANCE) -> bool | None:
        """Whether rank-1 and mAP differ by at most `tolerance` points; None without a reference to differ from."""
        return self.worst() * 100 <= tolerance if self.differences() else None

    def require(self, tolerance: float = DEFAULT_TOLERANCE) -> None:
        """Raise GateFailed where rank-1 or mAP differs from the reference's by more than `tolerance` points."""
        if self.passes(tolerance) is False:
            raise GateFailed(
                f"rank-1 or mAP differs by {100 * self.worst():.2f} points from the reference, more than {tolerance}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys backend, measured, reference, difference, paired_test and unmatched_queries; those
        that need a reference may be None."""
        return {
            "backend": self.backend,
            "measured": self.measured_scores.to_dict(),
            "reference": self.reference_scores.to_dict() if self.reference_scores else None,
            "difference": self.differences() or None,
            "paired_test": {key: one.to_dict() for key, one in self.paired().items()} or None,
            "unmatched_queries": self.unmatched,
            "sample": self.sample.to_dict() if self.sample else None,
        }


def validate(
    data: Dataset,
    embedder: Embedder,
    reference: Embedder | None,
    *,
    multi_query: QueryPooling | None = None,
    protocol: Protocol | None = None,
    per_query: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    reference_sample: int | None = None,
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
        store: a folder for embedding stores, one an engine, from which a run that was stopped goes on; None: nothing is
            kept. `validation_store` names the one that the command line takes.
        reference_sample: run the reference only on people who have so many images, and compare on them.
        batch_size: images an engine call.
        progress: called after each batch with the images done and to do, once for each of the two.

    Raises:
        UserError: an image cannot be read, no query has a right answer, or nothing to pool.
    """
    needed_subsets(multi_query)  # refuses what is no pooling before hours of embedding
    protocol = protocol or Protocol()
    protocol = replace(protocol, device=Arrays.open(protocol.device))  # refuses a device that is not there
    if per_query is not None and (not Path(per_query).parent.is_dir() or Path(per_query).is_dir()):
        raise UserError(f"--per-query {os.fspath(per_query)}: give the name of a file in a folder that exists")
    if reference and reference_sample is not None and reference_sample < len(data.query) + len(data.gallery):
        options: dict[str, Any] = {"protocol": protocol, "store": store, "batch_size": batch_size, "progress": progress}
        full = validate(data, embedder, None, multi_query=multi_query, per_query=per_query, **options)
        part = data.without_junk().sample(reference_sample, protocol.seed)
        _log.warning(
            f"the reference ranks only {len(part.query)} of {len(data.query)} queries and {len(part.gallery)} of "
            f"{len(data.gallery)} gallery images: the difference is about them"
        )
        return replace(full, sample=validate(part, embedder, reference, multi_query=multi_query, **options))
    everything, data = data, data.without_junk()
    left = len(everything.gallery) - len(data.gallery)
    if left:
        _log.info(f"{left} junk images of the gallery are never ranked, and not embedded")
    truth = Truth.of_dataset(data, cameras=protocol.cameras)
    names = [_name(image, data) for image in data.query]
    unmatched = [names[row] for row in truth.unmatched()]
    if len(unmatched) == len(names):
        raise UserError(NO_ANSWER)  # before hours of embedding
    notes = query_notes(names, truth)
    for note in notes:
        _log.warning(note)

    views, members = views_of_queries(data) if multi_query else ([], [])
    paths = [image.path for image in (*data.query, *views, *data.gallery)]

    def measure(embedder: Embedder, label: str) -> tuple[Scores, tuple[np.ndarray, np.ndarray]]:
        _log.info(
            f"ranking {len(data.query)} queries in {len(data.gallery)} gallery images of {data.root} with {label} on "
            f"{embedder.backend.device}"
        )
        update = (lambda _, done, total: progress(label, done, total)) if progress else None
        if store is not None:
            embeddings = embed_into(Path(store), paths, embedder, batch_size, update)
        else:
            embeddings = embedder.embed(paths, batch_size=batch_size, progress=update)
        query, of_views, gallery = np.split(embeddings, np.cumsum([len(data.query), len(views)]))
        if multi_query:
            query = pool_queries(query, of_views, members, multi_query)
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
    return Validation(embedder.backend.name, measured, expected, notes, unmatched, embeddings, data)


def embed_into(
    folder: Path, paths: Sequence[Path], embedder: Embedder, batch_size: int, progress: Progress | None = None
) -> np.ndarray:
    """Embed images through a store below `folder`, which a run that was stopped goes on from: float32 `[n, dim]`.

    Raises:
        UserError: an image cannot be read.
    """
    kept = folder / f"{embedder.backend.name}-{embedder.bundle.id[:12]}"
    root = Path(os.path.abspath(os.sep))  # the same whatever part of the data set is asked for
    source = files_source(paths, root)
    report = embed_folder(source, kept, embedder, batch_size=batch_size, progress=progress)
    if report.failed:
        name, reason = report.failed[0]
        raise UserError(f"'/{name}' cannot be embedded: {reason} ({len(report.failed)} images cannot be read)")
    store = Store.open(kept)
    where = {row.name: index for index, row in enumerate(store)}
    rows = [where[Path(os.path.abspath(path)).relative_to(root).as_posix()] for path in paths]
    return store.embeddings()[rows].astype(np.float32)


def validation_store(bundle: Bundle, data: Dataset) -> Path | None:
    """The folder in the user's cache for a bundle's embeddings of a data set; None, with a warning, where there is no
    cache that can be written."""
    key = sha256_bytes(f"{bundle.id}\0{os.path.abspath(data.root)}".encode("utf-8", "surrogateescape"))
    try:
        folder = cache_folder("validate") / key[:24]
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        problem = f"{folder} cannot be written"
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{folder} cannot be made ({error.strerror})"
    _log.warning(f"no embedding is kept for another run: {problem}; --store DIR keeps them")
    return None


def rank_gallery(data: Dataset, query: np.ndarray, gallery: np.ndarray) -> RankingMetrics:
    """Score the embeddings `[q, d]` and `[g, d]` of `data.query` and `data.gallery`."""
    return score_embeddings(query, gallery, Truth.of_dataset(data)).metrics


def _name(image: LabelledImage, data: Dataset) -> str:
    """Of a query, below the data set's folder."""
    return image.path.relative_to(data.root).as_posix() if image.path.is_relative_to(data.root) else str(image.path)
