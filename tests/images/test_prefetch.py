"""Decoding ahead: how many threads, and in which order."""

from __future__ import annotations

import os
import threading
import time

import pytest

from mgn_deploy.images import prefetch
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.machine import usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_a_process_that_is_kept_on_one_cpu_counts_one():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cpus() == len(before)


@pytest.mark.parametrize("cpus", [1, 24])
def test_there_is_a_thread_for_every_cpu_and_one_more(cpus, monkeypatch):
    monkeypatch.setattr(prefetch, "usable_cpus", lambda: cpus)
    together = threading.Barrier(cpus + 1)
    assert len(list(in_order(lambda _: together.wait(timeout=20), range(cpus + 1)))) == cpus + 1


def test_results_come_in_the_order_of_the_items():
    def slow_first(item):
        time.sleep(0.05 if item == 0 else 0)
        return item

    assert list(in_order(slow_first, range(100))) == list(range(100))


def test_no_more_than_asked_are_begun_before_their_result_is_taken():
    begun = []
    results = in_order(begun.append, range(100), ahead=5)
    next(results)
    assert len(begun) <= 6
    results.close()
