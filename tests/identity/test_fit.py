"""Evidence by Platt's line and by isotonic regression."""

import numpy as np
import pytest
from made_up_people import embeddings_of

from mgn_deploy.identity.fit import (
    cross_validated,
    evidence,
    fit_isotonic,
    fit_platt,
    pool_adjacent_violators,
    probability,
)
from mgn_deploy.identity.pairs import genuine_and_impostor

GENERATOR = np.random.default_rng(0)
# Two normals of one spread: the log likelihood ratio is a line.
GENUINE, IMPOSTOR = GENERATOR.normal(0.6, 0.1, 4000), GENERATOR.normal(0.3, 0.1, 40_000)


def true_evidence(x):
    return (0.6 - 0.3) / 0.1**2 * (x - 0.45)


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_the_evidence_of_two_normals_is_their_log_likelihood_ratio(fit):
    knots = fit(GENUINE, IMPOSTOR)
    x = np.linspace(0.37, 0.53, 9)
    np.testing.assert_allclose(evidence(x, knots), true_evidence(x), atol=0.35)


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_evidence_rises_and_is_no_stronger_than_the_pairs_that_it_was_learned_from(fit):
    knots = fit(GENUINE, IMPOSTOR)
    values = evidence(np.linspace(-1, 1, 2001), knots)
    assert (np.diff(values) >= 0).all()
    assert values[0] >= -np.log(len(GENUINE) + 1)
    assert values[-1] <= np.log(len(IMPOSTOR) + 1)
    assert values[-1] > values[0]


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_kinds_that_are_apart_give_finite_evidence(fit):
    values = evidence(np.array([-1, 0.1, 0.9, 1]), fit(np.array([0.8, 0.9, 0.95]), np.array([0.0, 0.1, 0.2, 0.3])))
    assert np.isfinite(values).all()
    assert values[1] < 0 < values[2]


def test_a_similarity_that_says_nothing_falls_to_the_prior():
    same = np.linspace(0, 1, 500)
    knots = fit_platt(same, same)
    np.testing.assert_allclose(probability(evidence(same, knots), 0.1), 0.1, atol=0.01)


def test_isotonic_is_scikit_learns():
    isotonic = pytest.importorskip("sklearn.isotonic", reason="scikit-learn is not installed")
    x = np.round(np.concatenate([GENUINE[:300], IMPOSTOR[:900]]), 3)
    y, weights = np.repeat([1, 0], [300, 900]), np.repeat([1 / 300, 1 / 900], [300, 900])
    theirs = isotonic.IsotonicRegression(out_of_bounds="clip").fit(x, y, sample_weight=weights)
    values, which = np.unique(x, return_inverse=True)
    same, other = np.bincount(which, y), np.bincount(which, 1 - y)
    blocks = pool_adjacent_violators(np.stack([same, other, values * (same + other)], axis=1), 300, 900)
    shares = blocks[:, 0] / 300 / (blocks[:, 0] / 300 + blocks[:, 1] / 900)
    assert len(shares) > 10
    np.testing.assert_allclose(shares, theirs.predict(blocks[:, 2] / blocks[:, :2].sum(axis=1)), atol=1e-9)


def test_platt_is_scikit_learns_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x = np.concatenate([GENUINE, IMPOSTOR])[:, None]
    weights = np.repeat([1 / len(GENUINE), 1 / len(IMPOSTOR)], [len(GENUINE), len(IMPOSTOR)]) * 1000
    theirs = linear.LogisticRegression(C=1e8, tol=1e-10).fit(x, np.repeat([1, 0], [4000, 40_000]), weights)
    at = np.linspace(0.3, 0.6, 7)
    ours = probability(evidence(at, fit_platt(GENUINE, IMPOSTOR)), 0.5)
    np.testing.assert_allclose(ours, theirs.predict_proba(at[:, None])[:, 1], atol=0.003)


def test_a_prior_moves_every_probability_by_its_odds():
    odds = probability(np.array([-2.0, 0, 3]), 0.5), probability(np.array([-2.0, 0, 3]), 0.1)
    ratio = (odds[0] / (1 - odds[0])) / (odds[1] / (1 - odds[1]))
    np.testing.assert_allclose(ratio, 9)


def test_cross_validation_holds_every_genuine_pair_out_once_and_impostors_within_a_fold():
    genuine, impostor = genuine_and_impostor(*embeddings_of(50))
    results = cross_validated(genuine, impostor, 50, 0.5)
    assert len(results["platt"].genuine) == len(genuine)
    assert len(results["platt"].impostor) == len(impostor) * 5 * (10 * 9) / (50 * 49)
    for one in results.values():
        assert 0 < one.brier < 0.25
        assert 0 < one.log_loss < np.log(2)
