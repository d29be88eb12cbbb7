"""The rate that an engine holds as a server."""

from __future__ import annotations

import time

import numpy as np
import pytest
from short_runs import short

from mgn_deploy.bench import server
from mgn_deploy.bench.server import search
from mgn_deploy.bench.speed import measure
from mgn_deploy.errors import CannotRun

FOREVER = float("inf")


def test_the_server_search_ends_near_the_highest_rate_that_holds():
    found = search(lambda rate: ((10.0 if rate <= 137 else 90.0), 100), 50.0, 100.0, FOREVER)
    assert found.held <= 137 < found.failed <= 1.05 * found.held
    assert (found.p99_ms, found.requests) == (10.0, 100)


def test_where_no_rate_holds_the_server_has_none():
    found = search(lambda rate: (90.0, 100), 50.0, 100.0, FOREVER)
    assert (found.held, found.p99_ms) == (0, None)


def test_without_time_for_a_trial_the_server_is_not_measured():
    with pytest.raises(CannotRun, match="left of --minutes"):
        search(lambda rate: (1.0, 100), 50.0, 100.0, time.monotonic())


@pytest.mark.timeout(60)
def test_an_engine_that_breaks_under_requests_ends_the_trial():
    pytest.importorskip("mlperf_loadgen")
    left = [3]

    def embed(images):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the GPU is lost")
        return images

    with pytest.raises(CannotRun, match="RuntimeError: the GPU is lost"):
        server.held_rate(embed, np.zeros((4, 1, 1, 3), np.uint8), 1, 100.0, 100.0, FOREVER)


def test_loadgen_finds_what_an_engine_holds(embedder, bundle_folder, crops):
    pytest.importorskip("mlperf_loadgen")
    with short(rounds=2) as patch:
        patch.setattr(server, "TRIALS", 2)
        result = measure(
            [bundle_folder], engines=["onnxruntime"], batches=[2], images=crops, count=8, minutes=0.5, p99=5000.0,
            reference=False,
        )  # fmt: skip
    found = result.rows[0].server
    assert found.held > 0
    assert found.p99_ms <= 5000
    assert found.requests >= 100
