"""`mgn-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.cli.options import Backend, Batch, Bundle, Json
from mgn_deploy.console import print_json, print_table


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
