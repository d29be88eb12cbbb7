"""`mgn-deploy validate`."""

from __future__ import annotations

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
