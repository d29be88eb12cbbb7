"""Ranking metrics: each rule on examples worked by hand, then all of them against a plain loop."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.distance import distance_matrix, distance_rows
from mgn_deploy.retrieval.ranking import RankingMetrics, evaluate, score_rows
from mgn_deploy.retrieval.truth import Truth

# As in Market-1501.
NOBODY = {"junk": {-1}, "distractors": {0}}


def one_query(distances, identities, cameras, identity=7, camera=1, dtype=np.float32) -> RankingMetrics:
    return evaluate(np.array([distances], dtype), [identity], [camera], identities, cameras, ranks=(1, 2, 3), **NOBODY)


def test_right_answers_at_ranks_2_and_4():
    metrics = one_query([0.1, 0.2, 0.3, 0.4, 0.5], [5, 7, 5, 7, 5], [2, 2, 2, 2, 2])
    assert metrics.rank == {1: 0, 2: 1, 3: 1}
    assert metrics.mAP == pytest.approx((1 / 2 + 2 / 4) / 2, abs=1e-12)
    assert metrics.mINP == pytest.approx(2 / 4, abs=1e-12)


def test_junk_is_ignored():
    metrics = one_query([0.1, 0.2, 0.3], [-1, 7, 5], [2, 2, 2])
    assert (metrics.rank[1], metrics.mAP, metrics.mINP) == (1, 1, 1)


def test_a_distractor_stays_as_a_wrong_answer():
    metrics = one_query([0.1, 0.2, 0.3], [0, 7, 5], [2, 2, 2])
    assert (metrics.rank[1], metrics.mAP, metrics.mINP) == (0, 0.5, 0.5)


def test_the_same_identity_in_the_same_camera_is_removed():
    metrics = one_query([0.1, 0.2, 0.3], [7, 7, 5], [1, 2, 2])
    assert (metrics.rank[1], metrics.mAP, metrics.mINP) == (1, 1, 1)


def test_another_identity_in_the_same_camera_stays():
    metrics = one_query([0.1, 0.2, 0.3], [5, 7, 5], [1, 2, 2])
    assert (metrics.rank[1], metrics.mAP, metrics.mINP) == (0, 0.5, 0.5)


@pytest.mark.parametrize(("identities", "rank"), [([5, 7, 5], 2), ([7, 5, 5], 1), ([5, 5, 7], 3)])
def test_equal_distances_rank_by_gallery_index(identities, rank):
    assert one_query([0.5, 0.5, 0.5], identities, [2, 2, 2]).mAP == pytest.approx(1 / rank, abs=1e-12)


def test_junk_and_removed_images_take_no_place_in_a_tie():
    metrics = one_query([0.5, 0.5, 0.5, 0.5], [-1, 7, 5, 7], [2, 1, 2, 2])
    assert metrics.mAP == 0.5


def test_infinite_distances_come_last_and_tie_among_themselves():
    metrics = one_query([np.inf, np.inf, np.inf, 0.3], [7, 5, 7, 5], [1, 2, 2, 2])
    assert metrics.mAP == pytest.approx(1 / 3, abs=1e-12)


def test_minus_zero_ties_with_zero():
    assert one_query([0.0, -0.0], [5, 7], [2, 2]).mAP == 0.5


@pytest.mark.parametrize("identity", [0, -1])
def test_every_number_is_a_persons_unless_the_data_set_says_otherwise(identity):
    metrics = evaluate(np.array([[0.2, 0.1]], np.float32), [identity], [1], [identity, 5], [2, 2])
    assert (metrics.mAP, metrics.queries_without_match) == (0.5, 0)


def test_without_cameras_every_other_image_of_the_person_is_a_right_answer():
    distances = np.array([[0.1, 0.2, 0.3]], np.float32)
    metrics = evaluate(distances, [7], None, [7, 5, 7], None)
    assert metrics.mAP == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)


def test_an_unknown_camera_is_not_another_unknown_one():
    distances = np.array([[0.1, 0.2]], np.float32)
    assert evaluate(distances, [7], [-2], [7, 7], [-2, -2]).scores.right_answers.tolist() == [2]


def test_a_query_that_is_in_the_gallery_itself_is_removed():
    truth = Truth([7, 7], None, [7, 5, 7], None, itself=[0, -1])
    distances = np.array([[0.0, 0.2, 0.3], [0.1, 0.2, 0.3]], np.float32)
    assert score_rows([(slice(0, 2), distances)], truth).average_precision == pytest.approx([1 / 2, (1 + 2 / 3) / 2])


def test_queries_without_a_right_answer_are_known_before_any_distance():
    truth = Truth([7, 8, 0, 9], [1, 1, 1, 1], [7, 8, 0, 5], [1, 2, 2, 2], distractors={0})
    assert truth.unmatched().tolist() == [0, 2, 3]
    assert np.flatnonzero(truth.nobody).tolist() == [2]


@pytest.mark.parametrize("identity", [9, 0, -1], ids=["absent", "distractor", "junk"])
def test_a_query_without_a_right_answer_is_counted_and_not_averaged(identity):
    distances = np.array([[0.2, 0.1, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]], np.float32)
    metrics = evaluate(distances, [identity, 7], [1, 1], [7, 5, 0, -1], [2, 2, 2, 2], **NOBODY)
    assert (metrics.mAP, metrics.queries, metrics.queries_without_match) == (1, 2, 1)


def test_cmc_counts_queries_whose_first_right_answer_is_within_the_rank():
    distances = np.array([[1, 2, 3], [2, 1, 3], [3, 2, 1]], np.float32)
    metrics = evaluate(distances, [7, 7, 7], [1, 1, 1], [7, 5, 5], [2, 2, 2], ranks=(1, 2, 3, 50))
    assert metrics.rank == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1, 50: 1})


def test_to_dict_is_json_ready_under_the_usual_names():
    distances = np.array([[0.1, 0.2]], np.float32)
    metrics = evaluate(distances, [7], [1], [7, 5], [2, 2])
    assert json.loads(json.dumps(metrics.to_dict())) == {
        "rank-1": 1.0,
        "rank-5": 1.0,
        "rank-10": 1.0,
        "mAP": 1.0,
        "mINP": 1.0,
        "queries": 1,
        "queries_without_match": 0,
    }


def by_plain_loop(distances, query_ids, query_cams, gallery_ids, gallery_cams, ranks) -> RankingMetrics | None:
    precisions, penalties, firsts = [], [], []
    for q in range(len(distances)):
        rank, hits, precision = 0, 0, 0.0
        for g in sorted(range(len(gallery_ids)), key=lambda g: (distances[q][g], g)):
            if gallery_ids[g] == -1:
                continue
            if gallery_ids[g] == query_ids[q] and gallery_cams[g] == query_cams[q]:
                continue
            rank += 1
            if gallery_ids[g] == query_ids[q] and gallery_ids[g] != 0:
                hits += 1
                precision += hits / rank
                if hits == 1:
                    firsts.append(rank)
                last = rank
        if hits:
            precisions.append(precision / hits)
            penalties.append(hits / last)
    if not firsts:
        return None
    n = len(firsts)
    cmc = {k: sum(first <= k for first in firsts) / n for k in ranks}
    return RankingMetrics(cmc, sum(precisions) / n, sum(penalties) / n, len(distances), len(distances) - n)


def assert_close(found: RankingMetrics, expected: RankingMetrics) -> None:
    assert found.to_dict() == pytest.approx(expected.to_dict(), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    queries=st.integers(1, 80),
    images=st.integers(1, 60),
    identities=st.integers(1, 6),
    cameras=st.integers(1, 3),
    levels=st.sampled_from([1, 3, 20, 10**6]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_scores_as_a_plain_loop_scores_it(queries, images, identities, cameras, levels, dtype, seed):
    rng = np.random.default_rng(seed)
    distances = (rng.integers(0, levels, (queries, images)) / levels).astype(dtype)
    distances[rng.random(distances.shape) < 0.05] = np.inf
    query_ids, gallery_ids = rng.integers(-1, identities, queries), rng.integers(-1, identities, images)
    query_cams, gallery_cams = rng.integers(0, cameras, queries), rng.integers(0, cameras, images)
    labels = query_ids, query_cams, gallery_ids, gallery_cams

    expected = by_plain_loop(distances.tolist(), *(values.tolist() for values in labels), (1, 5, 10))
    if expected is None:
        with pytest.raises(UserError, match="no query has a right answer"):
            evaluate(distances, *labels, **NOBODY)
    else:
        assert_close(evaluate(distances, *labels, **NOBODY), expected)


def embeddings_and_labels(queries: int, images: int):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((queries + images, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rng.integers(-1, 12, queries), rng.integers(0, 4, queries)
    labels += rng.integers(-1, 12, images), rng.integers(0, 4, images)
    return rows[:queries], rows[queries:], labels


def evaluate_in_tiles(query: np.ndarray, gallery: np.ndarray, labels) -> RankingMetrics:
    return RankingMetrics.of(score_rows(distance_rows(query, gallery, tile_bytes=1 << 18), Truth(*labels)))


def test_embeddings_score_as_their_distance_matrix_does():
    query, gallery, labels = embeddings_and_labels(150, 400)
    expected = evaluate(distance_matrix(query, gallery), *labels)
    assert_close(evaluate_in_tiles(query, gallery, labels), expected)


def test_scoring_embeddings_never_holds_the_whole_matrix():
    query, gallery, labels = embeddings_and_labels(800, 1500)
    tracemalloc.start()
    try:
        evaluate_in_tiles(query, gallery, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 800 * 1500 * 4 / 2


@pytest.mark.parametrize("column", [0, 1, 2], ids=["junk", "right", "wrong"])
def test_nan_distances_are_refused_and_their_query_named(column):
    distances = np.full((50, 3), 0.5, np.float32)
    distances[41, column] = np.nan
    with pytest.raises(UserError, match="query 41 hold NaN"):
        evaluate(distances, [7] * 50, [1] * 50, [-1, 7, 5], [2, 2, 2], **NOBODY)


@pytest.mark.parametrize("wrong", range(4))
def test_labels_of_another_length_are_refused_by_name(wrong):
    labels = [[7, 7], [1, 1], [7, 5, 5], [2, 2, 2]]
    labels[wrong] = labels[wrong][:-1]
    name = ("query identities", "query cameras", "gallery identities", "gallery cameras")[wrong]
    with pytest.raises(UserError, match=f"{name} have shape"):
        evaluate(np.ones((2, 3), np.float32), *labels)


@pytest.mark.parametrize(
    ("distances", "identity", "ranks", "sentence"),
    [
        (np.ones((1, 2), np.float32), 8, (1,), "no query has a right answer"),
        (np.ones((0, 2), np.float32), 7, (1,), "query identities have shape"),
        (np.ones(2, np.float32), 7, (1,), r"distances are float32 \[2\]"),
        (np.ones((1, 2), np.int64), 7, (1,), "distances are int64"),
        (np.ones((1, 2), np.float32), 7.5, (1,), "query identities are float64"),
        (np.ones((1, 2), np.float32), 7, (0, 1), "a rank starts at 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(distances, identity, ranks, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(distances, [identity], [1], [7, 5], [2, 2], ranks=ranks)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
def test_an_empty_matrix_has_no_right_answer(shape):
    with pytest.raises(UserError, match="no query has a right answer"):
        evaluate(np.ones(shape, np.float32), *([7] * n for n in shape for _ in range(2)))
