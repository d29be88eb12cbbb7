"""The GPU's time: of single runs, cold and warm, and of the two things that bound every kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mgn_deploy.bench.kernel.cases import DTYPES
from mgn_deploy.bench.kernel.contenders import Contender, graphed

# (start the work, whether the L2 cache is emptied before) -> seconds
Clock = Callable[[Callable[[], object], bool], float]

_HEAD_START = 200_000  # cycles, some 0.1 ms: what the host may run ahead, so that a launch is not waited for


class CudaClock:
    """Events around a run; returns seconds.

    In front of it, on the same stream, go 0.1 ms of nothing and then, for a cold run, a read of more than the L2 cache
    holds (reading leaves nothing to be written back later), for a warm run the run itself.
    """

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._other = torch.ones(max(4 * cache, 256 << 20) // 4, device="cuda")
        self._sum = torch.empty((), device="cuda")

    def __call__(self, run: Callable[[], object], cold: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        if cold:
            torch.sum(self._other, dim=0, out=self._sum)
        else:
            run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def in_turns(runs: Mapping[str, Callable[[], object]], clock: Clock, turns: int, cold: bool) -> dict[str, list[float]]:
    """Measure the seconds of each run in each turn, all of them once a turn; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            took = clock(run, cold)
            if turn:
                seconds[name].append(took)
    return seconds


def ceilings(clock: Clock, turns: int = 20) -> dict[str, Any]:
    """Measure what no kernel can be faster than, and what two events with nothing between them show."""
    found = {
        "copy_bytes_per_second": _copy_rate(clock, turns),
        "operations_per_second": {name: _matrix_rate(clock, turns, dtype) for name, dtype in DTYPES.items()},
        "nothing_us": 1e6 * _median(lambda: None, clock, turns, True),
    }
    torch.cuda.empty_cache()
    return found


def _copy_rate(clock: Clock, turns: int) -> float:
    """Measure a copy of 2 GiB on the device: bytes read and bytes written a second."""
    source = torch.empty(1 << 29, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), clock, turns, True)


def _matrix_rate(clock: Clock, turns: int, dtype: torch.dtype) -> float:
    """Measure a product of two random matrices: operations a second, a multiply-add being two; float32 is not tf32."""
    a, b, product = (torch.empty(8192, 8192, dtype=dtype, device="cuda").normal_() for _ in range(3))
    return 2 * 8192**3 / _median(lambda: torch.matmul(a, b, out=product), clock, turns, False)


def _median(run: Callable[[], object], clock: Clock, turns: int, cold: bool) -> float:
    return statistics.median(in_turns({"": run}, clock, turns, cold)[""])


class Network:
    """Times of the whole ResNet-50 MGN at 384x128, random weights, float16, channels-last, its own heads in it."""

    def __init__(self, clock: Clock) -> None:
        from mgn_deploy.config import ModelConfig
        from mgn_deploy.train.model import MGN, fold_batch_norms

        model = fold_batch_norms(MGN(ModelConfig())).half().cuda()
        self._model = model.to(memory_format=torch.channels_last)
        self._clock = clock
        self._known: dict[int, dict[str, Any]] = {}

    def times(self, rows: int) -> dict[str, Any]:
        """Return the medians in us of a forward of `rows` images (mirrors counted), plain and in a CUDA graph."""
        if rows not in self._known:
            self._known[rows] = self._measure(rows)
        return self._known[rows]

    def _measure(self, rows: int) -> dict[str, Any]:
        images = torch.empty(rows, 3, 384, 128, dtype=torch.half, device="cuda").normal_()
        images = images.contiguous(memory_format=torch.channels_last)
        eager = Contender(lambda: self._model(images))
        runs = {"eager_us": eager.run, "graph_us": graphed(eager).run}
        seconds = in_turns(runs, self._clock, 10, True)
        return {"rows": rows, **{name: 1e6 * statistics.median(each) for name, each in seconds.items()}}
