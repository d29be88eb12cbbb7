"""Thresholds, the equal error rate, and intervals over people."""

import numpy as np
import pytest
from made_up_people import embeddings_of

from mgn_deploy.identity.pairs import genuine_and_impostor
from mgn_deploy.identity.rates import (
    equal_error_rate,
    measure,
    needed_pairs,
    needed_people,
    threshold_at,
)


def test_a_threshold_accepts_at_most_the_rate_and_no_lower_one_would():
    impostor = np.sort(np.random.default_rng(0).normal(size=1000).astype(np.float32))[::-1]
    for far in (0.5, 0.01, 0.0105, 0.001):
        threshold = threshold_at(impostor, far)
        assert np.mean(impostor >= threshold) <= far
        assert np.mean(impostor >= np.nextafter(np.float32(threshold), np.float32(-np.inf))) > far


def test_equal_similarities_are_accepted_all_or_none():
    impostor = np.array([0.9, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], np.float32)
    assert np.mean(impostor >= threshold_at(impostor, 0.2)) == 0.1
    assert np.mean(impostor >= threshold_at(impostor, 0.4)) == 0.4


def test_the_equal_error_rate_of_two_shifted_normals_is_the_tail_beyond_their_middle():
    generator = np.random.default_rng(0)
    genuine, impostor = (np.sort(generator.normal(mean, 1, 50_000).astype(np.float32))[::-1] for mean in (2, 0))
    rate, threshold = equal_error_rate(genuine, impostor)
    assert rate == pytest.approx(0.1587, abs=0.004)  # P(N > 1)
    assert threshold == pytest.approx(1, abs=0.03)


def test_separate_kinds_have_no_error():
    rate, threshold = equal_error_rate(np.array([0.9, 0.8], np.float32), np.array([0.2, 0.1], np.float32))
    assert (rate, threshold) == (0, pytest.approx(0.8))


def test_the_rule_of_three_asks_for_pairs_and_for_people():
    assert [needed_pairs(far) for far in (1e-2, 1e-3, 1e-4)] == [300, 3000, 30_000]
    for far in (1e-2, 1e-3, 1e-4):
        people = needed_people(far)
        assert people * (people - 1) / 2 >= needed_pairs(far) > (people - 1) * (people - 2) / 2


def test_intervals_hold_the_rate_of_other_people_as_often_as_they_say():
    """In 20 worlds of 40 people: the threshold that 800 people give lies in about 19 intervals."""
    truth = genuine_and_impostor(*embeddings_of(800, 2, dim=12, seed=1))[1]
    threshold = threshold_at(truth.similarities, 0.05)
    held = 0
    for world in range(20):
        genuine, impostor = genuine_and_impostor(*embeddings_of(40, 6, dim=12, seed=100 + world))
        (rate,), _, _ = measure(genuine, impostor, (0.05,), 40, replicates=60, seed=world)
        held += rate.threshold.low <= threshold <= rate.threshold.high
    assert held >= 16  # 19 expected, standard deviation 1


def test_an_interval_over_people_is_wider_than_one_over_pairs_would_be():
    genuine, impostor = genuine_and_impostor(*embeddings_of(30, 20, dim=12))
    (rate,), _, _ = measure(genuine, impostor, (0.05,), 30, replicates=100)
    of_pairs = 2 * 1.96 * np.sqrt(0.05 * 0.95 / len(impostor))
    assert rate.measured_far.high - rate.measured_far.low > 3 * of_pairs
