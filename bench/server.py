"""The highest rate of random requests that an engine answers in time, by MLCommons' LoadGen (Server scenario).

Requests are of one image; the engine is called with what waits, up to a batch. LoadGen draws the arrivals (Poisson) and
takes latencies from when a request was due, so that a late engine cannot slow its own clients down
(https://github.com/mlcommons/inference/tree/master/loadgen).
"""

from __future__ import annotations

import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.bench.environment import sentence
from mgn_deploy.bench.result import Server
from mgn_deploy.errors import CannotRun
from mgn_deploy.packages import require

REQUESTS = 100  # the fewest of a trial: one of a hundred may be late
TRIAL_SECONDS = 1.0
NEAR = 1.05  # the search ends where the rate that failed is no further from the one that held
TRIALS = 12

# (requests a second) -> (the 99th percentile in ms, how many requests there were)
Trial = Callable[[float], tuple[float, int]]


def held_rate(
    embed: Callable[[np.ndarray], np.ndarray],
    crops: np.ndarray,
    batch: int,
    limit_ms: float,
    guess: float,
    until: float,
) -> Server:
    """Find the highest rate at which 99 of 100 requests are answered within `limit_ms`.

    Args:
        embed: of a batch `[n, height, width, 3]`, n from 1 to `batch`.
        crops: uint8 `[m, height, width, 3]`, asked for in turn.
        batch: most images a call.
        limit_ms: from when a request is due to its answer.
        guess: images a second that the engine can do with all at hand.
        until: of `time.monotonic()`: no trial is begun that would end after it.

    Raises:
        CannotRun: LoadGen is not installed, there is no time for one trial, or the engine breaks.
    """
    require("mlperf_loadgen", "bench", "--p99")
    for size in range(1, batch + 1):  # an engine may prepare itself for each
        embed(crops[np.arange(size) % len(crops)])
    return search(lambda rate: _trial(embed, crops, batch, rate), limit_ms, guess, until)


def search(trial: Trial, limit_ms: float, guess: float, until: float) -> Server:
    """Bisect for the rate: upwards from `guess` until one fails, then between. What did not fit is no figure."""
    held, rate = 0.0, 0.8 * guess
    failed: float | None = None
    found: tuple[float | None, int] = None, 0
    for number in range(TRIALS):
        if time.monotonic() + 1.3 * max(TRIAL_SECONDS, REQUESTS / rate) > until:
            if number:
                break
            raise CannotRun(f"{REQUESTS} requests take longer than what is left of --minutes")
        p99, requests = trial(rate)
        if p99 <= limit_ms:
            held, found = rate, (p99, requests)
        else:
            failed = rate
        if failed and held and failed / held < NEAR:
            break
        rate = 1.2 * rate if failed is None else (held + failed) / 2
    p99_ms, requests = found
    rounded = None if failed is None else round(failed, 2)
    return Server(limit_ms=limit_ms, held=round(held, 2), failed=rounded, p99_ms=p99_ms, requests=requests)


def _trial(embed: Callable[[np.ndarray], np.ndarray], crops: np.ndarray, batch: int, rate: float) -> tuple[float, int]:
    """Run LoadGen once at a rate."""
    import mlperf_loadgen as loadgen

    settings, logs = loadgen.TestSettings(), loadgen.LogSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps, settings.min_query_count = rate, REQUESTS
    settings.min_duration_ms = int(1000 * TRIAL_SECONDS)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    broken: list[Exception] = []

    def answer() -> None:
        while (first := waiting.get()) is not None:
            samples = [first]
            while len(samples) < batch and not waiting.empty():
                samples.append(waiting.get())
            try:
                embed(crops[[sample.index for sample in samples]])
            except Exception as error:  # LoadGen waits for every answer, for ever
                broken.append(error)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    worker = threading.Thread(target=answer, daemon=True)
    worker.start()

    def issue(samples: list[Any]) -> None:
        for sample in samples:
            waiting.put(sample)

    system = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(len(crops), len(crops), lambda _: None, lambda _: None)
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-loadgen-") as folder:
        logs.log_output.outdir, logs.log_output.copy_summary_to_stdout, logs.enable_trace = folder, False, False
        loadgen.StartTestWithLogSettings(system, library, settings, logs)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    waiting.put(None)
    worker.join()
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)
    if broken:
        raise CannotRun(sentence(broken[0]))
    p99 = re.search(r"99\.00 percentile latency \(ns\)\s*:\s*(\d+)", summary)
    processed = re.search(r"Processed (\d+) queries", summary)
    if p99 is None:
        raise CannotRun(f"LoadGen gave no percentiles: {' '.join(summary.split())[-200:]}")
    return round(int(p99[1]) / 1e6, 3), int(processed[1]) if processed else REQUESTS
