"""All figures of a ranking by one set of options: what `validate` and `evaluate` have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.choices import Device, Metric
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file, printable
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.arrays import Arrays
from mgn_deploy.retrieval.distance import distance_rows
from mgn_deploy.retrieval.expansion import augment_gallery, expand_queries
from mgn_deploy.retrieval.ranking import QueryScores, RankingMetrics, score_rows
from mgn_deploy.retrieval.rerank import rerank_rows
from mgn_deploy.retrieval.roc import Roc, roc
from mgn_deploy.retrieval.single_shot import SingleShot, single_shot
from mgn_deploy.retrieval.statistics import Difference, Interval, compare, confidence_intervals
from mgn_deploy.retrieval.truth import Truth

NAMED = 5  # queries in a sentence; JSON has them all


@dataclass(frozen=True)
class Protocol:
    """How embeddings are ranked, and what is measured besides rank-k, mAP and mINP.

    Attributes:
        metric: of the distances.
        cameras: whether the query's person by the query's camera is left out, as in the Market-1501 protocol.
        aqe, dba: neighbours that expand a query or a gallery image first; 0: none.
        rerank: also the figures after k-reciprocal re-ranking.
        roc: also TPR at fixed FPR and EER, over all pairs.
        single_shot: also CUHK03's classic protocol.
        intervals: also bootstrap intervals over queries.
        seed: of the draws of single-shot and of the bootstrap.
        device: where distances are computed.
    """

    metric: Metric = "cosine"
    cameras: bool = True
    aqe: int = 0
    dba: int = 0
    rerank: bool = False
    roc: bool = False
    single_shot: bool = False
    intervals: bool = False
    seed: int = 0
    device: Device | Arrays = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was asked for."""
        asked = {name: getattr(self, name) for name in ("metric", "cameras", "aqe", "dba", "rerank", "seed")}
        return {**asked, "device": Arrays.open(self.device).name}


@dataclass(frozen=True)
class Scores:
    """The figures of one ranking; None for what was not asked for."""

    metrics: RankingMetrics
    reranked: RankingMetrics | None = None
    roc: Roc | None = None
    single_shot: SingleShot | None = None
    intervals: dict[str, Interval] | None = None

    def paired(self, other: Scores | None) -> dict[str, Difference]:
        """These minus those of another ranking, query by query; empty where there is none."""
        if other is None or self.metrics.scores is None or other.metrics.scores is None:
            return {}
        return compare(self.metrics.scores, other.metrics.scores)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the keys of `RankingMetrics`, and reranked, roc, single_shot, ci95 where asked for."""
        more = {"reranked": self.reranked, "roc": self.roc, "single_shot": self.single_shot}
        return {
            **self.metrics.to_dict(),
            **{name: part.to_dict() for name, part in more.items() if part is not None},
            **({} if self.intervals is None else {"ci95": {key: list(ends) for key, ends in self.intervals.items()}}),
        }


def score_embeddings(
    query: np.ndarray,
    gallery: np.ndarray,
    truth: Truth,
    protocol: Protocol | None = None,
    *,
    progress: Progress | None = None,
) -> Scores:
    """Rank a gallery for all queries, and score the ranking.

    Args:
        query, gallery: embeddings `[q, d]` and `[g, d]`, unit rows.
        truth: who is who.
        protocol: how; by default that of Market-1501.
        progress: called with what re-ranking has done and has to do.

    Raises:
        UserError: embeddings that are empty, not finite or of two lengths; labels of another length; no query has a
            right answer.
    """
    protocol = protocol or Protocol()
    if truth.shape != (len(query), len(gallery)):
        raise UserError(f"labels are of {truth.shape} queries and images, embeddings of {(len(query), len(gallery))}")
    if not len(query) or not len(gallery):
        raise UserError("the query or the gallery is empty: no query has a right answer")
    arrays = Arrays.open(protocol.device)
    if protocol.dba:
        gallery = augment_gallery(gallery, protocol.dba)
    if protocol.aqe:
        query = expand_queries(query, gallery, protocol.aqe)
    tiles = partial(distance_rows, query, gallery, protocol.metric, device=arrays)
    scores = score_rows(tiles(), truth)
    reranked = None
    if protocol.rerank:
        rows = rerank_rows(query, gallery, device=arrays, progress=progress)
        reranked = RankingMetrics.of(score_rows(rows, truth))
    return Scores(
        RankingMetrics.of(scores),
        reranked,
        roc(tiles, truth) if protocol.roc else None,
        single_shot(tiles(), truth, seed=protocol.seed) if protocol.single_shot else None,
        confidence_intervals(scores, seed=protocol.seed) if protocol.intervals else None,
    )


def query_notes(names: Sequence[str], truth: Truth) -> list[str]:
    """Sentences about the queries that no figure is about: those that are nobody, and others without a right answer."""
    nobody = np.flatnonzero(truth.nobody)
    lonely = np.setdiff1d(truth.unmatched(), nobody)
    notes = []
    for rows, reason in (
        (nobody, "are nobody (junk, a distractor or without a label)"),
        (lonely, "have no right answer in the gallery"),
    ):
        if len(rows):
            first = ", ".join(repr(names[row]) for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
            notes.append(f"{len(rows):,} of {len(names):,} queries {reason} and take no part in the figures: {first}")
    return notes


def write_per_query(
    path: str | os.PathLike[str],
    names: Iterable[str],
    identities: np.ndarray,
    scores: Mapping[str, QueryScores | None],
) -> None:
    """Write one row a query as Parquet.

    Columns: query, identity, and for each ranking, behind its prefix, average_precision, first_rank, inverse_penalty
    (all missing where there is no right answer) and right_answers.

    Args:
        path: the file, replaced once the new one is whole.
        names: of the queries.
        identities: int64 `[q]`.
        scores: of each ranking by the prefix of its columns, as in "" and "reference_"; None: a ranking not made.

    Raises:
        UserError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {
        "query": pa.array([printable(name) for name in names], pa.string()),
        "identity": pa.array(identities, pa.int64()),
    }
    for prefix, of in scores.items():
        if of is not None:
            missing = ~of.matched
            for name in ("average_precision", "first_rank", "inverse_penalty"):
                columns[prefix + name] = pa.array(getattr(of, name), mask=missing)
            columns[f"{prefix}right_answers"] = pa.array(of.right_answers)
    with atomic_file(Path(path)) as file:
        pq.write_table(pa.table(columns), file)
