"""ROC, TPR at fixed FPR and EER against plain loops over all pairs, and against fast-reid's own way of counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgn_deploy.errors import UserError
from mgn_deploy.retrieval.roc import RATES, Roc, roc
from mgn_deploy.retrieval.truth import Truth


def curve(distances, truth: Truth, height: int = 7) -> Roc:
    starts = range(0, len(distances), height)
    return roc(lambda: ((slice(s, min(s + height, len(distances))), distances[s : s + height]) for s in starts), truth)


def all_pairs(distances, query_ids, query_cams, gallery_ids, gallery_cams) -> tuple[list[float], list[float]]:
    """Distances of one person's pairs and of two people's: as evaluate_roc of fast-reid's fastreid/evaluation/roc.py
    collects them, junk (-1) left out and queries who are nobody (-1, 0) with it."""
    same, different = [], []
    for q, row in enumerate(distances):
        if query_ids[q] in (-1, 0):
            continue
        for g, distance in enumerate(row):
            if gallery_ids[g] == -1 or (gallery_ids[g] == query_ids[q] and gallery_cams[g] == query_cams[q]):
                continue
            (same if gallery_ids[g] == query_ids[q] else different).append(distance)
    return same, different


def fast_reids_figure(same, different, rate) -> float:
    """`metrics.roc_curve(labels, distances)`, label 1 being different people, and the point nearest to the rate."""
    points = []
    for threshold in sorted({*same, *different}, reverse=True):
        points.append((sum(d >= threshold for d in same), sum(d >= threshold for d in different)))
    kept = [  # drop_intermediate: second differences of both counts are zero
        point
        for i, point in enumerate(points)
        if i in (0, len(points) - 1)
        or any(points[i + 1][axis] - 2 * point[axis] + points[i - 1][axis] for axis in (0, 1))
    ]
    rates = np.array([0, *(first for first, _ in kept)]) / len(same)
    shares = np.array([0, *(second for _, second in kept)]) / len(different)
    return shares[np.argmin(np.abs(rates - rate))]


def plain_eer(same, different) -> float:
    """Along the polyline of all thresholds, from accepting nobody on."""
    before = (0.0, 1.0)
    for threshold in sorted({*same, *different}):
        now = (
            sum(d <= threshold for d in different) / len(different),
            sum(d > threshold for d in same) / len(same),
        )
        if now[0] >= now[1]:
            gap, next_gap = before[1] - before[0], now[0] - now[1]
            part = gap / (gap + next_gap) if gap + next_gap else 0.0
            return before[0] + part * (now[0] - before[0])
        before = now
    raise AssertionError


@settings(max_examples=150, deadline=None)
@given(
    queries=st.integers(1, 20),
    images=st.integers(1, 30),
    identities=st.integers(1, 5),
    cameras=st.integers(1, 3),
    levels=st.sampled_from([2, 5, 40, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_gives_what_plain_loops_give(queries, images, identities, cameras, levels, seed):
    rng = np.random.default_rng(seed)
    distances = (rng.integers(0, levels, (queries, images)) / levels).astype(np.float32)
    labels = (
        rng.integers(-1, identities, queries),
        rng.integers(0, cameras, queries),
        rng.integers(-1, identities, images),
        rng.integers(0, cameras, images),
    )
    truth = Truth(*labels, junk={-1}, distractors={0})
    same, different = all_pairs(distances.tolist(), *(values.tolist() for values in labels))
    if not same or not different:
        with pytest.raises(UserError, match="a ROC curve needs both"):
            curve(distances, truth)
        return
    found = curve(distances, truth)
    assert (found.same_pairs, found.different_pairs) == (len(same), len(different))
    assert found.eer() == pytest.approx(plain_eer(same, different), abs=1e-9)
    for rate in (*RATES, 0.07, 0.3, 1.0):
        thresholds = [t for t in [-1.0, *same] if sum(d <= t for d in different) <= rate * len(different)]
        expected = sum(d <= max(thresholds) for d in same) / len(same)
        assert found.tpr_at(rate) == (pytest.approx(expected) if rate * len(different) >= 1 else None)
        assert found.fast_reid(rate) == pytest.approx(fast_reids_figure(same, different, rate), abs=1e-9)


def test_fast_reids_first_point_stays_though_the_step_behind_it_is_the_same():
    distances = np.array([[0.9, 0.8, 0.1, 0.9, 0.8, 0.5]], np.float32)
    found = curve(distances, Truth([1], None, [1, 1, 1, 2, 3, 4], None))
    assert found.fast_reid(0.3) == pytest.approx(1 / 3)
    assert fast_reids_figure([0.9, 0.8, 0.1], [0.9, 0.8, 0.5], 0.3) == pytest.approx(1 / 3)


def test_people_who_are_told_apart_have_no_error_and_a_threshold_between_them():
    distances = np.array([[0.1, 0.9, 0.8], [0.7, 0.2, 0.9]], np.float32)
    found = curve(distances, Truth([1, 2], None, [1, 2, 3], None))
    assert found.eer() == 0
    assert found.tpr_at(0.3) == 1
    assert found.threshold_at(0.3) == pytest.approx(0.2)


def test_a_rate_that_there_are_too_few_pairs_for_is_not_known():
    found = curve(np.array([[0.1, 0.9, 0.8]], np.float32), Truth([1], None, [1, 2, 3], None))
    assert (found.tpr_at(0.5), found.tpr_at(0.4), found.threshold_at(0.4)) == (1, None, None)
    assert found.to_dict()["tpr_at_fpr"]["1e-02"] is None
