"""The run of `bench.kernel`: case by case, first if each contender is right, then its times, in turns with others."""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgn_deploy.bench.kernel.cases import Case, Inputs, all_cases, random_inputs, right_answer
from mgn_deploy.bench.kernel.clock import Clock, CudaClock, Network, ceilings, in_turns
from mgn_deploy.bench.kernel.contenders import NAMES, Contender, check, makers
from mgn_deploy.bench.report import machine, sentence
from mgn_deploy.errors import CannotRun

_log = logging.getLogger("mgn_deploy")

TURNS = 40
METHOD = {
    "cold_us": "median GPU time between two CUDA events, the L2 cache emptied before each run by reading other memory",
    "warm_us": "the same right after another run over the same inputs",
    "head start": "0.1 ms of waiting on the GPU goes before each run, the host launches meanwhile: what it cannot "
    "launch in that time (eager's many kernels) shows, and Python's part of a launch may where the work is small",
    "headline": "kernel_graph, as the pipeline launches the kernel inside a CUDA graph; its rivals are named ..._graph",
    "turns": f"each contender once a turn, {TURNS} turns counted",
    "bytes": "each map, weight and bias once, the result once",
    "floor_us": "the larger of bytes over the measured copy rate (bytes read + written) and operations over the "
    "measured rate of an 8192^3 matrix product of that dtype",
    "error": "||result - reference|| / ||reference||, reference in float64, of fresh random inputs into poisoned "
    "memory; at most 1e-5 and, in 16 bits, a rounding: of the kernel one, of its rivals three",
    "of_network": "cold_us over the time of the whole ResNet-50 MGN's forward (float16, channels-last, CUDA graph)",
}


def run(minutes: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure all cases that are begun within `minutes`; `save` gets the result after each of them.

    What fails is in the result as a sentence: a contender's `failed`, a case's `failed`, or, where the GPU can be used
    no more, `stopped`.
    """
    deadline = time.monotonic() + 60 * minutes
    # float32 means float32: cuDNN's convolutions are tf32 unless told otherwise.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    seed = secrets.randbits(32)
    with torch.inference_mode():
        clock = CudaClock()
        _log.info("ceilings")
        result: dict[str, Any] = {
            "bench": "kernel",
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "method": METHOD,
            "contenders": NAMES,
            "seed": seed,
            "ceilings": ceilings(clock),
            "left_out": {},
            "not_begun": [],
            "cases": [],
        }
        network = _network(clock, result)
        save(result)
        for index, case in enumerate(all_cases()):
            if time.monotonic() > deadline or "stopped" in result:
                result["not_begun"].append(case.name)
                continue
            row = _case(case, seed + index, clock, result, network)
            result["cases"].append(row)
            _log.info(describe(row))
            save(result)
    save(result)
    return result


def _network(clock: Clock, result: dict[str, Any]) -> Network | None:
    try:
        return Network(clock)
    except Exception as error:
        result["left_out"]["network"] = sentence(error)
        return None


def _case(case: Case, seed: int, clock: Clock, result: dict[str, Any], network: Network | None) -> dict[str, Any]:
    try:
        inputs = random_inputs(case, "cuda", seed)
        row = measure_case(case, inputs, _makers(case, inputs), result["left_out"], clock, TURNS)
        add_figures(row, case, result["ceilings"])
        del inputs
    except Exception as error:
        row = {**identity(case), "failed": sentence(error)}
    _free()
    if network and (case.dtype, case.layout) == ("float16", "nhwc") and "contenders" in row:
        try:
            add_share(row, network.times(case.rows))
        except Exception as error:
            row["network"] = {"failed": sentence(error)}
        _free()
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:  # a sticky error: nothing runs in this process any more
        result["stopped"] = sentence(lost)
    return row


def _makers(case: Case, inputs: Inputs) -> dict[str, Callable[[], Contender]]:
    def tensorrt() -> Contender:
        from mgn_deploy.bench.kernel.tensorrt import tensorrt

        return tensorrt(case, inputs)

    return {**makers(case, inputs), "tensorrt": tensorrt}


def _free() -> None:
    """Free what a case took. After a sticky error there is nothing to free, and asking for it fails, too."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def identity(case: Case) -> dict[str, Any]:
    return {
        "dtype": case.dtype,
        "layout": case.layout,
        "output": case.output,
        "images": case.images,
        "rows": case.rows,
        "bytes": case.bytes,
        "operations": case.operations,
    }


def measure_case(
    case: Case,
    inputs: Inputs,
    ways: dict[str, Callable[[], Contender]],
    left_out: dict[str, str],
    clock: Clock,
    turns: int,
) -> dict[str, Any]:
    """Measure one row of the result. Who cannot run here at all goes into `left_out` and is not asked again."""
    expected = right_answer(case, inputs)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Tensor]] = {}
    for name, make in ways.items():
        if name in left_out:
            continue
        try:
            contender = make()
            found[name] = {**(contender.facts or {}), **check(contender, expected, case)}
        except CannotRun as reason:
            left_out[name] = str(reason)
        except Exception as error:
            found[name] = {"failed": sentence(error)}
        else:
            if "wrong" not in found[name]:
                ready[name] = contender.run
    row = {**identity(case), "contenders": found}
    try:
        for kind, cold in (("cold", True), ("warm", False)):
            for name, seconds in in_turns(ready, clock, turns, cold).items():
                found[name] |= _summary(kind, seconds)
    except Exception as error:
        row["failed"] = f"while timing: {sentence(error)}"
    return row


def _summary(kind: str, seconds: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([1e6 * one for one in seconds], n=4)
    return {f"{kind}_us": round(median, 3), f"{kind}_quartiles_us": [round(low, 3), round(high, 3)]}


def floor_of(case: Case, limits: dict[str, Any]) -> tuple[float, str]:
    """Return the seconds that no version can be much faster than, and whether bytes or operations say so."""
    moving = case.bytes / limits["copy_bytes_per_second"]
    reckoning = case.operations / limits["operations_per_second"][case.dtype]
    return (moving, "bytes") if moving >= reckoning else (reckoning, "operations")


def add_figures(row: dict[str, Any], case: Case, limits: dict[str, Any]) -> None:
    """Add what the times are worth: bytes/s over the copy's, time over the floor."""
    floor, bound = floor_of(case, limits)
    row |= {"floor_us": round(1e6 * floor, 3), "bound": bound}
    for found in row["contenders"].values():
        if "cold_us" in found:
            rate = 1e6 * case.bytes / found["cold_us"]
            found |= {
                "gb_per_second": round(rate / 1e9, 2),
                "of_copy": round(rate / limits["copy_bytes_per_second"], 4),
                "over_floor": round(found["cold_us"] / (1e6 * floor), 3),
            }


def add_share(row: dict[str, Any], network: dict[str, Any]) -> None:
    row["network"] = network
    for found in row["contenders"].values():
        if "cold_us" in found:
            found["of_network"] = round(found["cold_us"] / network["graph_us"], 5)


def describe(row: dict[str, Any]) -> str:
    """Make a line of progress of a row."""
    name = f"{row['dtype']} {row['layout']} {row['output']} {row['images']}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    cells = [
        f"{who} {found['cold_us']:.1f}" if "cold_us" in found else f"{who} {found.get('failed') or found['wrong']}"
        for who, found in row["contenders"].items()
    ]
    return f"{name}: floor {row['floor_us']:.1f} us, {', '.join(cells)}"
