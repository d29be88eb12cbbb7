"""`mgn-deploy validate` and `mgn-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.choices import DEFAULT_TOLERANCE, QueryPooling
from mgn_deploy.cli.options import AllowUnproven, Backend, Batch, Bundle, Data, Json
from mgn_deploy.console import percent, print_json, print_table, progress


def validate(
    data: Data,
    bundle: Bundle,
    backend: Backend = "auto",
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest allowed difference of rank-1 or mAP, in points.")
    ] = DEFAULT_TOLERANCE,
    reference: Annotated[
        bool, typer.Option(help="Also run the PyTorch reference; without it there is nothing to differ from.")
    ] = True,
    multi_query: Annotated[
        QueryPooling | None,
        typer.Option(help="Pool each query with gt_bbox's images of its person and camera (Market-1501)."),
    ] = None,
    batch: Batch = 8,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Measure rank-1/5/10, mAP and mINP beside PyTorch's.

    By the Market-1501 protocol. With --json the figures are fractions, not points.
    """
    from mgn_deploy.datasets import open_data
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.retrieval.multi_query import needed_subsets
    from mgn_deploy.retrieval.validate import KEYS
    from mgn_deploy.retrieval.validate import validate as run

    images = open_data(data, needed_subsets(multi_query))
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    original = Embedder.open_reference(bundle) if reference else None
    with progress() as update:
        result = run(images, embedder, original, multi_query=multi_query, batch_size=batch, progress=update)
    if json:
        asked = {"multi_query": multi_query, "notes": images.notes, "tolerance_points": tolerance}
        print_json({**result.to_dict(), **asked, "passed": result.passes(tolerance)})
    else:
        measured, differences = result.measured.to_dict(), result.differences()
        columns = ["", result.backend] + (["PyTorch", "difference"] if result.reference else [])
        rows = []
        for key in KEYS:
            cells = [key, percent(measured[key])]
            if result.reference:
                cells += [percent(result.reference.to_dict()[key]), f"{100 * differences[key]:+.2f}"]
            rows.append(cells)
        pooled = f", multiple-query ({multi_query})" if multi_query else ""
        print_table(columns, rows, title=f"{data}, {result.measured.queries} queries{pooled}; percent")
    result.require(tolerance)


def bench(
    bundle: Bundle,
    images: Annotated[Path | None, typer.Option(help="Folder of images; drawn people without it.")] = None,
    backend: Backend = "auto",
    batch: Batch = 8,
    count: Annotated[int, typer.Option(help="Images a run.")] = 64,
    runs: Annotated[int, typer.Option(help="Counted runs of each, after one that is not.")] = 5,
    reference: Annotated[bool, typer.Option(help="Also measure the PyTorch reference.")] = True,
    json: Json = False,
) -> None:
    """Measure images a second: engine, `embed` and PyTorch.

    The bare engine, embedding from image files to a store, and the PyTorch reference are run in turns. With --json
    every run is printed.
    """
    from mgn_deploy.bench.throughput import measure

    result = measure(bundle, images, backend, batch_size=batch, count=count, runs=runs, reference=reference)
    if json:
        print_json(result.to_dict())
        return
    rows = [
        [name, f"{series.median:.2f}", f"{min(series.rates):.2f}", f"{max(series.rates):.2f}", f"{series.ratio:.3f}"]
        for name, series in result.series.items()
    ]
    print_table(
        ["images/s", "median", "least", "most", "of bare engine"],
        rows,
        title=f"{result.model}, {result.backend}, batch {batch}, {result.machine}, {runs} runs of {result.images} "
        "images",
    )
