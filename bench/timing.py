"""How time is taken: clocks, warm-up, turns in random order, intervals that assume no distribution, and the machine's
limits.

On a GPU times are between CUDA events, on a CPU by the monotonic clock; the code around is the same.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from mgn_deploy.bench.environment import Strict

CONFIDENCE = 0.95
WINDOW, SETTLED = 5, 0.03  # warm-up: calls whose medians are compared, and the most that these may differ by
LIMIT_TURNS = 9
SLOW_PRODUCT = 0.2  # seconds: a type that takes longer (emulated, as float16 on most CPUs) has small matrices
_HEAD_START = 200_000  # cycles of a GPU, some 0.1 ms: what the host may run ahead, so that no launch is waited for
Key = TypeVar("Key")


class Interval(Strict):
    """A quantile and bounds that hold it with 95%; a bound is None where there are too few values to have one."""

    value: float
    low: float | None
    high: float | None


class Spread(Strict):
    """The median of the rounds' figures, bounds that hold it with `confidence` (95%, less where the rounds are few),
    and the figures."""

    median: float
    low: float
    high: float
    confidence: float
    rounds: list[float]

    @property
    def variation(self) -> float | None:
        """Standard deviation over mean; None of fewer than three rounds."""
        if len(self.rounds) < 3:
            return None
        return round(statistics.stdev(self.rounds) / statistics.fmean(self.rounds), 4)


def quantile(values: Sequence[float], share: float) -> Interval:
    """A quantile with order statistics as bounds, by the binomial distribution of how many values lie below it.

    Hahn, Meeker: Statistical Intervals (1991), 5.2. Values are taken as independent; calls one after the other are not
    quite, so bounds over rounds (`spread`) are what two runs are compared by.
    """
    ordered, count = sorted(values), len(values)
    below = _binomial(count, share)  # P(at most k values lie below the quantile)
    tail = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(below, tail, side="right")) - 1  # the largest k with P(X <= k) <= tail
    high = int(np.searchsorted(below, 1 - tail))  # the least k with P(X <= k) >= 1 - tail
    value = ordered[min(count - 1, math.ceil(share * count) - 1)]
    return Interval(value=value, low=ordered[low] if low >= 0 else None, high=ordered[high] if high < count else None)


def spread(rounds: Sequence[float], digits: int = 4) -> Spread:
    """The rounds' median with bounds by order statistics; of fewer than six rounds these are least and most."""
    ordered, count = sorted(rounds), len(rounds)
    below = _binomial(count, 0.5)
    rank = max(0, int(np.searchsorted(below, (1 - CONFIDENCE) / 2, side="right")) - 1)
    confidence = 1 - 2 * float(below[rank]) if count > 1 else 0.0
    figures = (statistics.median(rounds), ordered[rank], ordered[-1 - rank], *rounds)
    median, low, high, *every = (round(one, digits) for one in figures)
    return Spread(median=median, low=low, high=high, confidence=round(confidence, 3), rounds=every)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: each is of neighbours in time."""
    return round(statistics.median(one / other for one, other in zip(ours, theirs, strict=True)), 4)


def _binomial(count: int, share: float) -> np.ndarray:
    """P(X <= k) for k = 0 .. count, of `count` draws with chance `share`."""
    k = np.arange(count)
    steps = np.log((count - k) / (k + 1)) + math.log(share / (1 - share))
    return np.exp(np.concatenate([[0.0], np.cumsum(steps)]) + count * math.log1p(-share)).cumsum().clip(0, 1)


class WarmUp(Strict):
    """Calls and seconds before anything was counted; `settled`: the last calls took as long as those before them."""

    calls: int
    seconds: float
    settled: bool


def warm_up(run: Callable[[], object], limit: float) -> WarmUp:
    """Call until the median of the last 5 calls is within 3% of that of the 5 before, for `limit` seconds at most."""
    start, took = time.perf_counter(), list[float]()
    while True:
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
        settled = False
        if len(took) >= 2 * WINDOW:
            before, last = statistics.median(took[-2 * WINDOW : -WINDOW]), statistics.median(took[-WINDOW:])
            settled = abs(last / before - 1) <= SETTLED
        seconds = time.perf_counter() - start
        if settled or seconds > limit:
            return WarmUp(calls=len(took), seconds=round(seconds, 3), settled=settled)


def in_turns(
    tasks: Mapping[Key, Callable[[], Any]], *, until: float, fewest: int, most: int, seed: int
) -> dict[Key, list[Any]]:
    """Run all tasks once a round, in another random order each time; the results of each, in the order of the rounds.

    No round is begun after `until` (of `time.monotonic()`) that is not one of the `fewest`, nor one that would end
    after it if it took as long as the last.
    """
    order, results = random.Random(seed), {key: list[Any]() for key in tasks}
    keys, took = list(tasks), 0.0
    for number in range(most):
        began = time.monotonic()
        if number >= fewest and began + took > until:
            break
        order.shuffle(keys)
        for key in keys:
            results[key].append(tasks[key]())
        took = time.monotonic() - began
    return results


def calls(run: Callable[[], object], seconds: float, most: int = 10_000) -> list[float]:
    """Seconds of single calls, one after the other, for as long as that."""
    end, took = time.perf_counter() + seconds, list[float]()
    while not took or (time.perf_counter() < end and len(took) < most):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return took


class Clock:
    """Takes the seconds of one run on a device, "cuda" or "cpu", with a cold or a warm last-level cache.

    On CUDA, in front of the run, on the same stream, go 0.1 ms of nothing and then, for a cold run, a read of more than
    the cache holds (reading leaves nothing to be written back later), for a warm run the run itself.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self.device = torch, device
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 32 << 20
        size = max(4 * cache, 256 << 20) if device == "cuda" else 2 * cache
        self._other = torch.ones(size // 4, device=device)
        self._sum = torch.empty((), device=device)

    def __call__(self, run: Callable[[], object], cold: bool) -> float:
        if self.device == "cuda":
            self._torch.cuda._sleep(_HEAD_START)
        if cold:
            self._torch.sum(self._other, dim=0, out=self._sum)
        else:
            run()
        if self.device == "cpu":
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class Limits(Strict):
    """What the machine can do, measured in the run: operations/s of a matrix product by type (a multiply-add being
    two), bytes read and written a second by a copy. `by` is the library that was asked."""

    by: str
    copy_bytes_per_second: float
    operations_per_second: dict[str, float]


@cache
def limits(device: str) -> Limits:
    """Measure the limits of a device, the best of some turns: by PyTorch, or without it by NumPy in float32 alone."""
    try:
        import torch
    except ImportError:
        return _limits_by_numpy()
    clock = Clock(device)
    sizes, words = ((1024, 8192), 1 << 29) if device == "cuda" else ((128, 1024), 1 << 25)
    found: dict[str, float] = {}

    def least(run: Callable[[], object], cold: bool) -> float:  # what other work on the machine disturbed least
        return min(clock(run, cold) for _ in range(LIMIT_TURNS))

    def rate(dtype: Any, size: int) -> float:
        a, b = (torch.randn(size, size, device=device).mul(9).to(dtype) for _ in range(2))
        product: Any = torch._int_mm if dtype == torch.int8 else torch.matmul
        return 2 * size**3 / least(lambda: product(a, b), cold=False)

    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            try:
                small = rate(dtype, sizes[0])
                slow = 2 * sizes[1] ** 3 / small > SLOW_PRODUCT
                found[str(dtype).removeprefix("torch.")] = small if slow else rate(dtype, sizes[1])
            except RuntimeError:  # this build or device has no such product
                continue
        source = torch.ones(words, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / least(lambda: target.copy_(source), cold=True)
    return Limits(by=f"torch {torch.__version__}", copy_bytes_per_second=copied, operations_per_second=found)


def _limits_by_numpy() -> Limits:
    a, source = np.ones((1024, 1024), np.float32), np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    product = min(calls(lambda: a @ a, 1.0, LIMIT_TURNS))
    copy = min(calls(lambda: np.copyto(target, source), 1.0, LIMIT_TURNS))
    moved, rates = 2 * source.nbytes / copy, {"float32": 2 * 1024**3 / product}
    return Limits(by=f"numpy {np.__version__}", copy_bytes_per_second=moved, operations_per_second=rates)
