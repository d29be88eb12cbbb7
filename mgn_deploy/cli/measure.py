"""`mgn-deploy validate` and `mgn-deploy bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from mgn_deploy.console import BACKENDS, percent, print_json, print_table, progress, say
from mgn_deploy.errors import GateFailed


def validate(
    data: str = typer.Option(
        ...,
        help="KIND:DIR; market1501, dukemtmc, cuhk03-labeled, cuhk03-detected, msmt17, or folder: any in Market's layout.",
    ),
    bundle: Path = typer.Option(..., help="The bundle to validate."),
    backend: str = typer.Option("auto", help=BACKENDS),
    tolerance: float = typer.Option(0.5, min=0, help="Largest allowed difference of rank-1 or mAP, in points."),
    reference: bool = typer.Option(
        True, help="Also run the PyTorch reference; without it there is nothing to differ from."
    ),
    multi_query: str | None = typer.Option(
        None, help="avg or max: pool each query with gt_bbox's images of its person and camera (Market-1501)."
    ),
    batch: int = typer.Option(8, min=1, max=4096, help="Images an engine call."),
    allow_unproven: bool = typer.Option(False, help="Run an engine that the bundle has no passed proof for."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON; fractions, not points."),
) -> None:
    """Rank-1/5/10, mAP and mINP by the Market-1501 protocol, beside the PyTorch reference's."""
    from mgn_deploy.datasets import open_data
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.retrieval.multi_query import needed_subsets
    from mgn_deploy.retrieval.validate import KEYS
    from mgn_deploy.retrieval.validate import validate as run

    images = open_data(data, needed_subsets(multi_query))
    for note in images.notes:
        say(note)
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    original = Embedder.open_reference(bundle) if reference else None
    say(
        f"{len(images.query)} queries, {len(images.gallery)} gallery images of {images.root}, "
        f"{embedder.backend.name} on {embedder.backend.device}"
    )
    with progress() as update:
        result = run(images, embedder, original, multi_query=multi_query, batch_size=batch, progress=update)
    passed = result.worst() * 100 <= tolerance
    if json:
        print_json(
            {
                **result.to_dict(),
                "multi_query": multi_query,
                "notes": images.notes,
                "tolerance_points": tolerance,
                "passed": passed if reference else None,
            }
        )
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
    if reference and not passed:
        raise GateFailed(
            f"rank-1 or mAP differs by {100 * result.worst():.2f} points from the reference, more than {tolerance}"
        )


def bench(
    bundle: Path = typer.Option(..., help="The bundle to measure."),
    images: Path | None = typer.Option(None, help="Folder of images; drawn people without it."),
    backend: str = typer.Option("auto", help=BACKENDS),
    batch: int = typer.Option(8, min=1, max=4096, help="Images an engine call."),
    count: int = typer.Option(64, min=8, help="Images a run."),
    runs: int = typer.Option(5, min=1, help="Counted runs of each, after one that is not."),
    reference: bool = typer.Option(True, help="Also measure the PyTorch reference."),
    json: bool = typer.Option(False, "--json", help="Print every run as JSON."),
) -> None:
    """Images a second: the bare engine, folder-to-store embedding, and the PyTorch reference, run in turns."""
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
        title=f"{result.model}, {result.backend}, batch {batch}, {result.machine}, {runs} runs of {result.images} images",
    )
