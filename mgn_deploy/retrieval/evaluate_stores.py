"""Accuracy of two labelled stores: queries in one, the gallery in the other."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import UNKNOWN, Store
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.evaluation import Protocol, Scores, query_notes, score_embeddings
from mgn_deploy.retrieval.search import check_same_bundle
from mgn_deploy.retrieval.statistics import Difference
from mgn_deploy.retrieval.truth import Truth

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Evaluation:
    """How well the labels of two stores agree with their embeddings, as fractions.

    Attributes:
        scores: of the two stores.
        against: of the two that they are compared with, or None.
        names: of the queries.
        identities: int64 `[q]`, of the queries.
        notes: sentences about images without labels and queries without a right answer.
        unmatched: the names of the queries without a right answer.
    """

    scores: Scores
    against: Scores | None
    names: list[str]
    identities: np.ndarray
    notes: list[str]
    unmatched: list[str]

    def paired(self) -> dict[str, Difference]:
        """First minus second, query by query; empty where there is nothing to compare with."""
        return self.scores.paired(self.against)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "measured": self.scores.to_dict(),
            "against": self.against.to_dict() if self.against else None,
            "paired_test": {key: one.to_dict() for key, one in self.paired().items()} or None,
            "unmatched_queries": self.unmatched,
            "notes": self.notes,
        }


def evaluate_stores(
    query: Store,
    gallery: Store,
    *,
    against: tuple[Store, Store] | None = None,
    junk: Collection[int] = (),
    distractors: Collection[int] = (),
    protocol: Protocol | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Rank the gallery for every query, and score the ranking by the labels of the stores' rows.

    Every number is a person's but those of `junk` and `distractors`. A gallery image without a label is a wrong answer
    to everybody, one without a camera is of no known camera, and a query's own file is removed from its ranking.

    Args:
        query, gallery: of one bundle, with labels (`embed --labels`); the two may be one store.
        against: query and gallery stores of the same images, by another engine or model.
        junk, distractors: identities that name nobody; Market-1501's are -1 and 0.
        protocol: how the gallery is ranked and what is measured.
        progress: called with what re-ranking has done and has to do.

    Raises:
        UserError: other bundles, no labels, no query with a right answer, or `against` holds other queries.
    """
    protocol = protocol or Protocol()
    truth = _truth(query, gallery, junk, distractors, protocol)
    scores = score_embeddings(query.embeddings(), gallery.embeddings(), truth, protocol, progress=progress)
    other = None
    if against is not None:
        if [row.name for row in against[0]] != [row.name for row in query]:
            raise UserError(
                f"{against[0].folder} holds other queries than {query.folder}, or in another order: only rankings of "
                "the same queries are compared"
            )
        theirs = _truth(*against, junk, distractors, protocol)
        if not np.array_equal(theirs.query_identities, truth.query_identities):
            raise UserError(f"{against[0].folder} has other labels than {query.folder}: embed both with one --labels")
        rows, others = (store.embeddings() for store in against)
        other = score_embeddings(rows, others, theirs, protocol, progress=progress)
    names = [row.name for row in query]
    notes = query_notes(names, truth)
    unlabelled = int(np.count_nonzero(gallery.identities() == UNKNOWN))
    if unlabelled:
        notes.insert(0, f"{unlabelled:,} of {len(gallery):,} gallery images have no label and count as wrong answers")
    for note in notes:
        _log.warning(note)
    unmatched = [names[row] for row in truth.unmatched()]
    return Evaluation(scores, other, names, truth.query_identities, notes, unmatched)


def _truth(
    query: Store, gallery: Store, junk: Collection[int], distractors: Collection[int], protocol: Protocol
) -> Truth:
    check_same_bundle(query.manifest.bundle_id, gallery)
    for store in (query, gallery):
        if not len(store):
            raise UserError(f"{store.folder} holds no embedded image")
        if (store.identities() == UNKNOWN).all():
            raise UserError(
                f"the images of {store.folder} have no labels, so that no answer is known to be right: embed them with "
                "--labels market1501, folder or FILE.csv"
            )
    own = {(gallery.manifest.source, row.name): index for index, row in enumerate(gallery)}
    itself = [own.get((query.manifest.source, row.name), -1) for row in query]
    cameras = (query.cameras(), gallery.cameras()) if protocol.cameras else (None, None)
    return Truth(
        query.identities(),
        cameras[0],
        gallery.identities(),
        cameras[1],
        junk=junk,
        distractors=[*distractors, UNKNOWN],
        itself=itself,
    )
