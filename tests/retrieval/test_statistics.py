"""Intervals and tests: known answers, plain loops, and how often they are wrong."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.ranking import QueryScores
from mgn_deploy.retrieval.statistics import compare, confidence_intervals


def scores_of(precision, first=None) -> QueryScores:
    precision = np.asarray(precision, np.float64)
    first = np.ones(len(precision), np.int64) if first is None else np.asarray(first)
    return QueryScores(first, precision, precision / 2, np.ones(len(precision), np.int64))


def test_an_interval_holds_the_figure_and_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    precision = rng.random(400)
    found = confidence_intervals(scores_of(precision))
    low, high = found["mAP"]
    error = precision.std() / np.sqrt(400)
    assert low < precision.mean() < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.08)
    assert found["mINP"] == pytest.approx((low / 2, high / 2), rel=1e-9)
    assert found["rank-1"] == (1, 1)


def test_queries_without_an_answer_take_no_part():
    some = scores_of([0.2, 0.9, 0.0, 0.5], first=[3, 1, 0, 2])
    same = scores_of([0.2, 0.9, 0.5], first=[3, 1, 2])
    assert confidence_intervals(some) == confidence_intervals(same)


def test_a_seed_gives_the_same_interval_whatever_the_blocks(monkeypatch):
    scores = scores_of(np.random.default_rng(1).random(50))
    whole = confidence_intervals(scores, seed=3)
    monkeypatch.setattr("mgn_deploy.retrieval.statistics.BLOCK_VALUES", 500)
    in_blocks = confidence_intervals(scores, seed=3)
    assert [*in_blocks.values()] == [pytest.approx(interval) for interval in whole.values()]
    assert confidence_intervals(scores, seed=4) != whole


def test_p_is_the_share_of_sign_flips_that_are_as_far_from_zero():
    difference = np.array([0.1, 0.05, -0.02, 0.08, 0.01, 0.03, -0.01, 0.06])
    first, second = scores_of(0.5 + difference), scores_of(np.full(8, 0.5))
    means = [np.mean(np.array(signs) * difference) for signs in product([-1, 1], repeat=8)]
    exact = np.mean(np.abs(means) >= difference.mean() - 1e-12)
    found = compare(first, second, flips=40_000)["mAP"]
    assert found.mean == pytest.approx(difference.mean())
    assert found.p == pytest.approx(exact, abs=0.005)


def test_rankings_that_are_equal_differ_by_nothing():
    scores = scores_of(np.random.default_rng(2).random(30))
    found = compare(scores, scores)
    assert {one.p for one in found.values()} == {1}
    assert {(one.mean, one.interval) for one in found.values()} == {(0, (0, 0))}


def test_a_clear_difference_is_found_and_chance_is_found_as_often_as_it_should_be():
    rng = np.random.default_rng(3)
    base = rng.random(200)
    assert compare(scores_of(base + 0.05 * rng.random(200)), scores_of(base))["mAP"].p < 0.001
    p = [compare(scores_of(base + rng.normal(0, 0.1, 200)), scores_of(base), flips=400)["mAP"].p for _ in range(100)]
    assert 0 <= np.mean(np.array(p) < 0.1) <= 0.22  # 10 expected, a standard deviation of 3


def test_another_number_of_queries_and_no_answers_are_refused():
    with pytest.raises(UserError, match="one ranking has 2 queries and the other 1"):
        compare(scores_of([0.1, 0.2]), scores_of([0.1]))
    with pytest.raises(UserError, match="no query has a right answer in both"):
        compare(scores_of([0.0], first=[0]), scores_of([0.1]))
    with pytest.raises(UserError, match="nothing to be sure of"):
        confidence_intervals(scores_of([0.0], first=[0]))
