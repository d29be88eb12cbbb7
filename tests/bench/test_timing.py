"""Intervals by order statistics, warm-up by convergence, and the machine's limits."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from scipy.stats import binom

from mgn_deploy.bench import environment, timing
from mgn_deploy.bench.timing import quantile, spread, warm_up


@pytest.mark.parametrize(("count", "share"), [(40, 0.5), (1000, 0.99), (100_000, 0.999)])
def test_the_binomial_distribution_is_scipys(count, share):
    np.testing.assert_allclose(
        timing._binomial(count, share)[: count + 1], binom.cdf(np.arange(count + 1), count, share), atol=1e-8
    )


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_bounds_hold_the_quantile_as_often_as_they_say(share):
    rng, held = np.random.default_rng(0), 0
    truth = -np.log(1 - share)  # of the exponential distribution
    for _ in range(400):
        found = quantile(rng.exponential(size=600), share)
        held += (found.low or 0) <= truth <= (found.high or np.inf)
    assert 0.93 <= held / 400 <= 0.995


def test_a_quantile_beyond_what_the_values_can_bound_has_no_upper_bound():
    found = quantile(list(range(300)), 0.999)
    assert (found.value, found.high) == (299, None)
    assert found.low is not None


@pytest.mark.parametrize(("count", "confidence"), [(1, 0.0), (3, 0.75), (6, 0.969), (12, 0.961)])
def test_the_medians_bounds_say_how_sure_they_are(count, confidence):
    found = spread(list(range(count)))
    assert found.confidence == confidence
    assert found.low <= found.median <= found.high


def test_warm_up_ends_when_calls_take_as_long_as_those_before_them(monkeypatch):
    """Twenty calls that become faster, then even ones."""
    now, took = [0.0], iter([1.0 / (1 + 0.2 * n) for n in range(20)] + [0.2] * 100)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = warm_up(lambda: now.__setitem__(0, now[0] + next(took)), 1000)
    assert found.settled
    assert 20 <= found.calls <= 35


def test_warm_up_that_never_settles_ends_with_its_time_and_says_so(monkeypatch):
    now, took = [0.0], iter([1.1**n for n in range(100)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = warm_up(lambda: now.__setitem__(0, now[0] + next(took)), 50)
    assert not found.settled
    assert found.seconds < 100


def test_without_pytorch_the_limits_are_numpys():
    found = timing._limits_by_numpy()
    assert found.by.startswith("numpy")
    assert set(found.operations_per_second) == {"float32"}
    assert found.copy_bytes_per_second > 1e7


def test_a_changed_source_tree_is_told_from_the_commit_and_from_other_changes(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    source = tmp_path / "environment.py"
    monkeypatch.setattr(environment, "__file__", str(source))
    found = []
    for content in ("a", "b", "c"):
        source.write_text(content)
        if content == "a":
            git("init", "--quiet")
            git("add", ".")
            git("commit", "--quiet", "--message", "a")
        found.append(environment._commit())
    assert len(set(found)) == 3
    assert all(one.partition("+")[0] == found[0] for one in found)
