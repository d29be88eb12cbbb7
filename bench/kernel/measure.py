"""One case of the heads: first if each contender is right, then its times in turns with the others, and their worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from mgn_deploy.bench.environment import sentence
from mgn_deploy.bench.kernel.cases import Case, Inputs, right_answer
from mgn_deploy.bench.kernel.contenders import Contender, check
from mgn_deploy.bench.timing import Clock, Limits, in_turns
from mgn_deploy.errors import CannotRun

TURNS = 40


def checked(
    case: Case, inputs: Inputs, ways: dict[str, Callable[[], Contender]]
) -> Iterator[tuple[dict[str, Any], Callable[[], Tensor] | None]]:
    """A row a contender, with `error` and `bit_equal` or why there are none; and how to run one that is right."""
    expected = right_answer(case, inputs)
    for name, make in ways.items():
        row: dict[str, Any] = {"row": case.name, "contender": name}
        try:
            contender = make()
            row |= {**(contender.facts or {}), **check(contender, expected, case)}
        except CannotRun as reason:
            yield {**row, "left_out": str(reason)}, None
        except Exception as error:
            yield {**row, "failed": sentence(error)}, None
        else:
            if "wrong" not in row and name.startswith("kernel") and not row["bit_equal"]:
                row["wrong"] = "two runs differ"
            if "wrong" in row:
                row["failed"] = row.pop("wrong")
            yield row, None if "failed" in row else contender.run


def measured(
    case: Case,
    inputs: Inputs,
    ways: dict[str, Callable[[], Contender]],
    clock: Clock,
    limits: Limits,
    turns: int = TURNS,
) -> list[dict[str, Any]]:
    """Return the rows of `checked` with times in microseconds: cold (the cache emptied before), warm, and quartiles.

    By the cold ones also the share of the copy's bytes a second, and the time over what no version can be much faster
    than.
    """
    rows, runs = [], dict[str, Callable[[], Tensor]]()
    for row, run in checked(case, inputs, ways):
        rows.append(row)
        if run:
            runs[row["contender"]] = run
    floor, bound = floor_of(case, limits)
    for kind, cold in (("cold", True), ("warm", False)):
        tasks = {name: lambda run=run, cold=cold: clock(run, cold) for name, run in runs.items()}
        try:
            seconds = in_turns(tasks, until=time.monotonic(), fewest=turns, most=turns, seed=turns)
        except Exception as error:  # what was checked before is worth having
            return [*rows, {"row": case.name, "failed": f"while timing: {sentence(error)}"}]
        for row in rows:
            if row["contender"] in seconds:
                row |= _summary(kind, seconds[row["contender"]])
    for row in rows:
        row |= {"floor_us": round(1e6 * floor, 3), "bound": bound}
        if "cold_us" in row:
            row["of_copy"] = round(1e6 * case.bytes / row["cold_us"] / limits.copy_bytes_per_second, 4)
            row["over_floor"] = round(row["cold_us"] / (1e6 * floor), 3)
    return rows


def _summary(kind: str, seconds: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([1e6 * one for one in seconds], n=4)
    return {f"{kind}_us": round(median, 3), f"{kind}_quartiles_us": [round(low, 3), round(high, 3)]}


def floor_of(case: Case, limits: Limits) -> tuple[float, str]:
    """Return the seconds that no version can be much faster than, and whether bytes or operations say so."""
    moving = case.bytes / limits.copy_bytes_per_second
    reckoning = case.operations / limits.operations_per_second.get(case.dtype, float("inf"))
    return (moving, "bytes") if moving >= reckoning else (reckoning, "operations")
