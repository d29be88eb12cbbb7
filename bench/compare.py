"""Two results of `mgn-deploy bench` beside each other: SAME, FASTER, SLOWER or UNSURE, by intervals."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

from mgn_deploy.bench.result import Result, Row
from mgn_deploy.bench.timing import Spread
from mgn_deploy.errors import GateFailed, UserError

Verdict = Literal["SAME", "FASTER", "SLOWER", "UNSURE"]
FEWEST_ROUNDS = 4  # with fewer, intervals part by chance too often (of two times three figures once in ten)
TOLERANCE = 0.03  # medians that differ by less are the same: two runs on one quiet machine do


class Compared(NamedTuple):
    """One figure of one row in both runs; `speed` is new over old, above 1 faster."""

    row: str
    figure: str
    old: float
    new: float
    speed: float
    verdict: Verdict
    remark: str


def compare(old: Result, new: Result) -> list[Compared]:
    """Compare what both runs have: single-stream latency, offline rate and `embed`'s rate of each row.

    Raises:
        UserError: they are of different machines, or have no row in common.
    """
    machines = [(one.environment.hardware, one.environment.cpus) for one in (old, new)]
    if not machines[0][0].is_same_device(machines[1][0]) or machines[0][1] != machines[1][1]:
        described = " and ".join(f"{hardware}, {cpus} CPUs" for hardware, cpus in machines)
        raise UserError(f"these are of different machines, whose speeds tell nothing of the code: {described}")
    known, found = _measured(old), _measured(new)
    both = [key for key in found if key in known]
    if not both:
        raise UserError("no row is in both: an engine, a precision and a batch of the same model")
    return [one for key in both for one in _rows(known[key], found[key])]


def require_no_slower(compared: list[Compared]) -> None:
    """Raise GateFailed where a figure is SLOWER."""
    slower = [
        f"{one.row} ({one.figure}: {one.speed:.3f} of the old speed)" for one in compared if one.verdict == "SLOWER"
    ]
    if slower:
        raise GateFailed("slower: " + "; ".join(slower))


def _measured(result: Result) -> dict[tuple[str, int], Row]:
    """Rows by name; of several bundles that it fits, as two INT8 ones of a model, by their number as well."""
    seen = Counter[str]()
    rows = {}
    for row in result.rows:
        if row.offline:
            rows[row.name, seen[row.name]] = row
            seen[row.name] += 1
    return rows


def _rows(old: Row, new: Row) -> list[Compared]:
    figures = [("offline images/s", old.offline, new.offline), ("embed images/s", old.embed, new.embed)]
    if old.pixels and new.pixels:
        figures.insert(0, ("latency ms", old.pixels.rounds, new.pixels.rounds))
    noisy = [name for name, row in (("old", old), ("new", new)) if row.noise.flags]
    remarks = ["another bundle"] if old.bundle_id != new.bundle_id else []
    remarks += [f"noise in {' and '.join(noisy)}"] if noisy else []
    disturbed, found = old.noise.disturbed or new.noise.disturbed, []
    for figure, before, after in figures:
        if before and after:
            speed = before.median / after.median if figure == "latency ms" else after.median / before.median
            verdict = _verdict(before, after, speed, disturbed)
            medians = before.median, after.median
            found.append(Compared(new.name, figure, *medians, round(speed, 4), verdict, ", ".join(remarks)))
    return found


def _verdict(old: Spread, new: Spread, speed: float, disturbed: bool) -> Verdict:
    """Medians within the tolerance are the same. Beyond it a difference is one where the intervals do not meet, both
    are of four rounds at least, and nobody else used the machine."""
    if abs(speed - 1) <= TOLERANCE:
        return "SAME"
    meet = old.low <= new.high and new.low <= old.high
    if meet or disturbed or min(len(old.rounds), len(new.rounds)) < FEWEST_ROUNDS:
        return "UNSURE"
    return "FASTER" if speed > 1 else "SLOWER"
