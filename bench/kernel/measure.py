"""One case of the heads: first if each contender is right, then its times in turns with the others, and their worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from mgn_deploy.bench.environment import sentence
from mgn_deploy.bench.kernel.cases import EXACT, ROUNDING, Case, Inputs, right_answer
from mgn_deploy.bench.kernel.contenders import Contender
from mgn_deploy.bench.timing import Clock, Limits, in_turns
from mgn_deploy.errors import CannotRun

Ways = Mapping[str, Callable[[], Contender]]


def check(contender: Contender, expected: Tensor, case: Case) -> dict[str, Any]:
    """Run twice into spoilt memory.

    Returns:
        `error` of the first run against float64, `bit_equal` of both, in `failed` why the contender may not be timed.
    """
    results = []
    for _ in range(2):
        contender.poison()
        results.append(contender.run().clone())
    first, second = results
    if first.shape != expected.shape:
        return {"failed": f"the result is {list(first.shape)}, not {list(expected.shape)}"}
    if not bool(first.isfinite().all()):
        return {"failed": "not every number of the result was written, or some are not finite"}
    error = float((first.double() - expected).norm() / expected.norm())
    most = EXACT + contender.roundings * ROUNDING[case.dtype]
    found = {"error": error, "bit_equal": bool((first == second).all())}
    return found if error <= most else {**found, "failed": f"the error {error:.2g} is above {most:.2g}"}


def checked(case: Case, inputs: Inputs, ways: Ways) -> Iterator[tuple[dict[str, Any], Callable[[], Tensor] | None]]:
    """A row a contender, with `error` and `bit_equal` or why there are none; and how to run one that is right."""
    expected = right_answer(case, inputs)
    for name, make in ways.items():
        row: dict[str, Any] = {"row": case.name, "contender": name}
        run = None
        try:
            contender = make()
            row |= {**contender.facts, **check(contender, expected, case)}
            if name.startswith("kernel") and not row.get("bit_equal", True):
                row.setdefault("failed", "two runs differ")
            run = None if "failed" in row else contender.run
        except CannotRun as reason:
            row["left_out"] = str(reason)
        except Exception as error:
            row["failed"] = sentence(error)
        yield row, run


def measured(case: Case, inputs: Inputs, ways: Ways, clock: Clock, limits: Limits, turns: int) -> list[dict[str, Any]]:
    """Return the rows of `checked` with times in microseconds: cold (the cache emptied before), warm, and quartiles.

    By the cold ones also the share of the copy's bytes a second, and the time over what no version can be much faster
    than.
    """
    pairs = list(checked(case, inputs, ways))
    rows, runs = [row for row, _ in pairs], {row["contender"]: run for row, run in pairs if run}
    floor, bound = floor_of(case, limits)
    for kind, cold in (("cold", True), ("warm", False)):
        tasks = {name: lambda run=run, cold=cold: clock(run, cold) for name, run in runs.items()}
        try:
            seconds = in_turns(tasks, until=time.monotonic(), fewest=turns, most=turns, seed=turns)
        except Exception as error:  # what was checked before is worth having
            return [*rows, {"row": case.name, "failed": f"while timing: {sentence(error)}"}]
        for row in rows:
            if took := seconds.get(row["contender"]):
                low, median, high = (round(1e6 * one, 3) for one in statistics.quantiles(took, n=4))
                row |= {f"{kind}_us": median, f"{kind}_quartiles_us": [low, high]}
    for row in rows:
        row |= {"floor_us": round(1e6 * floor, 3), "bound": bound}
        if "cold_us" in row:
            row["of_copy"] = round(1e6 * case.bytes / row["cold_us"] / limits.copy_bytes_per_second, 4)
            row["over_floor"] = round(row["cold_us"] / (1e6 * floor), 3)
    return rows


def floor_of(case: Case, limits: Limits) -> tuple[float, str]:
    """Return the seconds that no version can be much faster than, and whether bytes or operations say so."""
    moving = case.bytes / limits.copy_bytes_per_second
    reckoning = case.operations / limits.operations_per_second.get(case.dtype, float("inf"))
    return max((moving, "bytes"), (reckoning, "operations"))
