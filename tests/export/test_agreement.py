"""Neighbours in two engines' embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.export.proof.agreement import TIE, top_agreement


def plain_agreement(embeddings: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Row by row: which of the k nearest are at least as near, by the reference, as its own k-th nearest."""
    shares = []
    for row in range(len(reference)):
        others = [other for other in range(len(reference)) if other != row]
        k = min(k, len(others))
        nearest = sorted(others, key=lambda other: -float(embeddings[row] @ embeddings[other]))[:k]
        similarities = {other: float(reference[row] @ reference[other]) for other in others}
        kth = sorted(similarities.values(), reverse=True)[k - 1]
        shares.append(sum(similarities[other] >= kth - TIE for other in nearest) / k)
    return float(np.mean(shares))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 1))
def test_top_agreement_is_a_plain_loops(n, k, seed, noise):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n, 6))
    embeddings = reference + noise * rng.normal(size=(n, 6))
    assert top_agreement(embeddings, reference, k) == pytest.approx(
        plain_agreement(embeddings, reference, k), abs=1e-12
    )


def test_neighbours_that_tie_are_equally_right():
    reference = np.array([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    other_order = reference + np.array([[0, 0], [3e-7, 0], [2e-7, 0], [1e-7, 0]])
    assert top_agreement(other_order, reference, 1) == 1


def test_neighbours_that_are_all_wrong_are_no_agreement():
    reference = np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1], [0, 0.1, 1]])
    assert top_agreement(reference[[0, 2, 1, 3]], reference, 1) == 0
