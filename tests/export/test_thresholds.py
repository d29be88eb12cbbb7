"""Thresholds of a tensor's histogram: what each method cuts off."""

from __future__ import annotations

import numpy as np
import pytest

from mgn_deploy.export.precision.ranges import BINS, TensorRange
from mgn_deploy.export.precision.thresholds import METHODS, PERCENTILE, thresholds


def test_max_cuts_nothing_off():
    assert thresholds({"a": TensorRange(3.5)}, "max") == {"a": 3.5}


def test_percentile_leaves_the_tail_out():
    histogram = np.zeros(BINS)
    histogram[:100] = 1000
    histogram[-1] = 1
    one = TensorRange(2048.0, histogram=histogram)
    assert thresholds({"a": one}, "percentile")["a"] == pytest.approx(100, abs=1)
    histogram[-1] = 100_000 * (1 - PERCENTILE) * 2
    assert thresholds({"a": one}, "percentile")["a"] == 2048


@pytest.mark.parametrize(("method", "most"), [("mse", 45), ("entropy", 20)])
def test_an_outlier_is_cut_off_and_an_even_spread_is_not(method, most):
    values = np.abs(np.random.default_rng(0).normal(size=100_000))
    outlier = np.append(values, 60.0)
    histogram = np.histogram(outlier, BINS, (0, 60.0))[0].astype(float)
    assert 2 < thresholds({"a": TensorRange(60.0, histogram=histogram)}, method)["a"] < most
    even = np.ones(BINS)
    assert thresholds({"a": TensorRange(1.0, histogram=even)}, method)["a"] > 0.95


def test_mse_is_the_best_of_all_thresholds_by_brute_force():
    values = np.abs(np.random.default_rng(1).standard_t(3, size=20_000))
    largest = values.max()
    histogram = np.histogram(values, BINS, (0, largest))[0].astype(float)
    found = thresholds({"a": TensorRange(largest, histogram=histogram)}, "mse")["a"]

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(((np.minimum(np.round(values / step), 127) * step - values) ** 2).mean())

    assert error(found) <= 1.05 * min(error(share * largest) for share in np.linspace(0.02, 1, 200))


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_scale_above_zero(method):
    assert thresholds({"a": TensorRange(0.0, histogram=np.zeros(BINS))}, method)["a"] > 0
