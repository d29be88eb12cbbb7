"""The bench's result as a table and as one HTML page that needs nothing else (`page.html.jinja` draws the plots)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mgn_deploy.bench.result import JSON_NAME, PAGE_NAME, Result, Row
from mgn_deploy.bench.timing import Interval
from mgn_deploy.files import write_text

LABEL = 0.03  # the share of the plot's width that a label takes
_PLAIN = re.compile(r" \[.*?\]")
COLUMNS = (
    "row", "p50 ms", "p90", "p99", "p99.9", "from bytes", "images/s", "x PyTorch", "embed", "server/s", "mAP",
    "of matrix", "MB", "J/image", "noise",
)  # fmt: skip


def write_result(result: Result, folder: Path) -> None:
    """Write the JSON and the page into a folder, which is made.

    Raises:
        UserError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JSON_NAME, result.model_dump_json(indent=1) + "\n")
    write_text(folder / PAGE_NAME, page(result))


def table(result: Result, bounds: bool = True) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people; columns that no row has a figure for are left out, and so is a model that all rows
    have. What the noise of a row is, `remarks` says; without `bounds` the table is as narrow as a terminal."""
    rows = [[row.name.removeprefix(f"{result.models} "), *_cells(row)] for row in result.rows]
    if not bounds:
        rows = [[_PLAIN.sub("", cell) for cell in cells] for cells in rows]
    kept = [index for index in range(len(COLUMNS)) if index == 0 or any(row[index] for row in rows)]
    return [COLUMNS[index] for index in kept], [[row[index] for index in kept] for row in rows]


def _cells(row: Row) -> list[str]:
    pixels = row.pixels
    if pixels is None or row.image_bytes is None or row.offline is None:  # it could not run
        return [""] * (len(COLUMNS) - 1)
    return [
        *(_bounded(one) for one in (pixels.p50, pixels.p90, pixels.p99, pixels.p999, row.image_bytes.p50)),
        f"{row.offline.median:.1f} [{row.offline.low:.1f}, {row.offline.high:.1f}]",
        f"{row.over_reference:.2f}" if row.over_reference else "",
        f"{row.embed.median:.1f} ({row.embed_of_offline:.2f})" if row.embed else "",
        f"{row.server.held:.1f}" if row.server else "",
        f"{100 * row.accuracy.mAP:.2f}" if row.accuracy else "",
        f"{row.of_matrix_rate:.0%}" if row.of_matrix_rate else "",
        f"{row.host_bytes / 1e6:.0f}" if row.host_bytes is not None else "",
        f"{row.joules_per_image:.2f}" if row.joules_per_image is not None else "",
        "yes" if row.noise.flags else "",
    ]


def _bounded(one: Interval) -> str:
    low, high = (f"{bound:.2f}" if bound is not None else "?" for bound in (one.low, one.high))
    return f"{one.value:.2f} [{low}, {high}]"


def remarks(result: Result) -> list[str]:
    """What the table does not say: the machine, its limits, and what was not measured."""
    machine, limits = result.environment, result.limits
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.operations_per_second.items())
    said = [
        f"{machine.hardware}, {machine.cpus} of {machine.cores} CPUs, governor {machine.governor}"
        f"{', virtual' if machine.virtual else ''}; {result.seconds:.0f} s of {60 * result.minutes:.0f}",
        f"limits by {limits.by}: copy {limits.copy_bytes_per_second / 1e9:.1f} GB/s, GFLOP/s: {rates}",
        f"energy: {result.energy}",
    ]
    missing: dict[str, list[str]] = {}
    for row in result.rows:
        for what, why in row.not_measured.items():
            missing.setdefault(f"{what}: {why}", []).append(row.name)
    for row in result.rows:
        said += [f"{row.name}: {'; '.join(row.noise.flags)}"] if row.noise.flags else []
    return said + [f"not measured: {what} ({len(names)} rows)" for what, names in missing.items()]


def page(result: Result) -> str:
    """Make the HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    columns, rows = table(result)
    measured = [row for row in result.rows if row.pixels and row.offline]
    return environment.get_template("page.html.jinja").render(
        result=result,
        columns=columns,
        rows=rows,
        remarks=remarks(result),
        measured=measured,
        pareto=_pareto(measured),
    )


def _pareto(rows: list[Row]) -> dict[str, Any]:
    """Accuracy over latency an image: which rows no other beats in both, and where each lies between 0 and 1."""
    points: list[dict[str, Any]] = [
        {"name": row.name, "x": row.pixels.p50.value / row.batch, "y": 100 * row.accuracy.mAP}
        for row in rows
        if row.accuracy and row.pixels
    ]
    if not points:
        return {}
    xs, ys = ([point[axis] for point in points] for axis in "xy")
    margin = max(max(ys) - min(ys), 1.0) * 0.1
    low, high = min(ys) - margin, max(ys) + margin
    points.sort(key=lambda point: (point["x"], -point["y"]))
    ends = list[float]()  # of the labels above each other: where the last one is
    for number, point in enumerate(points):
        point["best"] = all(faster["y"] < point["y"] for faster in points[:number])
        point["at_x"], point["at_y"] = point["x"] / (1.1 * max(xs)), (point["y"] - low) / (high - low)
        at = point["at_x"]
        point["level"] = next((level for level, end in enumerate(ends) if at - end > LABEL), len(ends))
        ends[point["level"] : point["level"] + 1] = [at]
    return {"points": points, "most_x": 1.1 * max(xs), "low": low, "high": high}
