"""`evaluate`: two labelled stores, by hand and on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import mgn_deploy
from made_up_store import Labelled, write_store

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.evaluate_stores import evaluate_stores
from mgn_deploy.retrieval.evaluation import Protocol, score_embeddings
from mgn_deploy.retrieval.truth import Truth


@pytest.fixture
def people(tmp_path) -> tuple[Store, Store]:
    """Ten people, numbered from 0, by three cameras: one query each and the rest."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((10, 8))

    def embed(identities: list[int]) -> np.ndarray:
        rows = centres[identities] + 0.8 * rng.standard_normal((len(identities), 8))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    asked: Labelled = [(f"q{person}.jpg", person, 1) for person in range(10)]
    rest: Labelled = [(f"g{person}_{camera}.jpg", person, camera) for person in range(10) for camera in (1, 2, 3)]
    return (
        write_store(tmp_path / "query", asked, embed([row[1] for row in asked]), source="q"),
        write_store(tmp_path / "gallery", rest, embed([row[1] for row in rest]), source="g"),
    )


def by_hand(query: Store, gallery: Store, **options):
    labels = query.identities(), query.cameras(), gallery.identities(), gallery.cameras()
    return score_embeddings(query.embeddings(), gallery.embeddings(), Truth(*labels, **options)).metrics


def test_the_labels_of_the_rows_are_what_answers_are_judged_by(people):
    result = evaluate_stores(*people)
    assert result.scores.metrics == by_hand(*people)
    assert result.scores.metrics.queries_without_match == 0
    assert (result.notes, result.unmatched, result.paired()) == ([], [], {})


def test_numbers_are_nobody_only_where_the_user_says_so(people):
    result = evaluate_stores(*people, distractors=[0], junk=[9])
    assert result.scores.metrics == by_hand(*people, distractors=[0], junk=[9])
    assert result.unmatched == ["q0.jpg", "q9.jpg"]
    assert "2 of 10 queries are nobody" in result.notes[0]


def test_a_store_in_itself_never_finds_the_query_itself(people):
    _, gallery = people
    result = evaluate_stores(gallery, gallery, protocol=Protocol(cameras=False))
    products = gallery.embeddings() @ gallery.embeddings().T
    precision = []
    for query, row in enumerate(gallery.rows):
        order = [i for i in np.argsort(-products[query], kind="stable") if i != query]
        hits = [gallery.rows[i].identity == row.identity for i in order]
        ranks = [rank for rank, hit in enumerate(hits, 1) if hit]
        precision.append(np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]))
    assert result.scores.metrics.mAP == pytest.approx(np.mean(precision))


def test_images_without_labels_are_wrong_answers_and_no_queries(people, tmp_path, said):
    query, gallery = people
    rows: Labelled = [(row.name, row.identity, row.camera) for row in gallery.rows]
    rows[4] = (rows[4][0], None, None)
    partly = write_store(tmp_path / "partly", rows, gallery.embeddings(), source="g")
    asked: Labelled = [(row.name, None if row.identity == 3 else row.identity, row.camera) for row in query.rows]
    some = write_store(tmp_path / "some", asked, query.embeddings(), source="q")
    result = evaluate_stores(some, partly)
    assert result.unmatched == ["q3.jpg"]
    assert result.notes[0] == "1 of 30 gallery images have no label and count as wrong answers"
    assert "without a label" in result.notes[1]
    assert set(result.notes) <= set(said)


def test_stores_of_another_engine_are_compared_query_by_query(people, tmp_path):
    query, gallery = people
    worse = [
        write_store(
            tmp_path / f"other {store.folder.name}",
            [(row.name, row.identity, row.camera) for row in store.rows],
            np.roll(store.embeddings(), 1, axis=0),
            bundle_id="c" * 64,
            source=store.folder.name[0],
        )
        for store in people
    ]
    result = evaluate_stores(query, gallery, against=(worse[0], worse[1]))
    assert result.against.metrics == by_hand(*worse)
    difference = result.scores.metrics.mAP - result.against.metrics.mAP
    assert result.paired()["mAP"].mean == pytest.approx(difference)
    with pytest.raises(UserError, match="holds other queries than"):
        evaluate_stores(query, gallery, against=(gallery, gallery))


def test_stores_of_two_bundles_and_without_labels_are_refused(people, tmp_path):
    query, _ = people
    other = write_store(tmp_path / "o", [("a.jpg", 1, 1)], np.eye(1, 8, dtype=np.float32), bundle_id="c" * 64)
    with pytest.raises(UserError, match="embed both with one bundle"):
        evaluate_stores(query, other)
    unlabelled = write_store(tmp_path / "u", [("a.jpg", None, None)], np.eye(1, 8, dtype=np.float32))
    with pytest.raises(UserError, match=r"have no labels.*--labels market1501, folder or FILE\.csv"):
        evaluate_stores(query, unlabelled)
    alone = write_store(tmp_path / "s", [("a.jpg", 77, 1)], np.eye(1, 8, dtype=np.float32))
    with pytest.raises(UserError, match="no query has a right answer"):
        evaluate_stores(query, alone)


def test_the_command_prints_a_table_and_json(people):
    query, gallery = (store.folder for store in people)
    arguments = ["evaluate", query, gallery, "--distractor", 0, "--ci", "--roc", "--against", query, gallery]
    done = mgn_deploy(*arguments)
    assert done.exit_code == 0, done.stderr
    for word in ("mAP", "EER", " to ", "against query", "difference", "+0.00", "queries without a right answer", "1"):
        assert word in done.stdout
    assert "1 of 10 queries are nobody" in done.stderr
    printed = json.loads(mgn_deploy(*arguments, "--json").stdout)
    assert printed["measured"]["mAP"] == pytest.approx(by_hand(*people, distractors=[0]).mAP)
    assert printed["unmatched_queries"] == ["q0.jpg"]
    assert printed["paired_test"]["mAP"] == {"mean": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


@pytest.mark.parametrize("command", [("evaluate", "q", "g"), ("validate", "--data", "folder:d", "--bundle", "b")])
def test_figures_are_never_computed_through_an_index_and_the_refusal_says_why(command):
    done = mgn_deploy(*command, "--index", "index.db")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "mAP depend on every neighbour, and what an approximate index misses would look like" in done.stderr
