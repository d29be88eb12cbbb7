"""`mgn-deploy validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import DEFAULT_TOLERANCE, QueryPooling
from mgn_deploy.cli.options import AllowUnproven, Backend, Batch, Bundle, Data, Json, RankDevice, Seed
from mgn_deploy.cli.scores import (
    Aqe,
    Cameras,
    Dba,
    Intervals,
    MetricOption,
    NoIndex,
    PerQuery,
    Rerank,
    RocOption,
    SingleShotOption,
    more,
    print_scores,
)
from mgn_deploy.console import percent, print_json, print_table, progress, say

if TYPE_CHECKING:
    from mgn_deploy.identity.open_set import OpenSet


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
    reference_sample: Annotated[
        int | None, more("--reference-sample", min=2, help="Run the reference only on people with so many images.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Where embeddings are kept, for a run that is stopped; without it the user's cache."),
    ] = None,
    batch: Batch = 8,
    metric: MetricOption = "cosine",
    cameras: Cameras = True,
    rerank: Rerank = False,
    aqe: Aqe = 0,
    dba: Dba = 0,
    roc: RocOption = False,
    single_shot: SingleShotOption = False,
    ci: Intervals = False,
    open_set: Annotated[
        bool, more("--open-set", help="Enrol half of the people and measure DIR at FPIR, 100 draws.")
    ] = False,
    per_query: PerQuery = None,
    index: NoIndex = None,
    device: RankDevice = "cpu",
    seed: Seed = 0,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Measure rank-1/5/10, mAP and mINP beside PyTorch's.

    By the Market-1501 protocol, over exact neighbours and never through an index. With --json the figures are
    fractions, not points. p is the probability of a difference like this one by chance, from a permutation test over
    the queries.
    """
    from mgn_deploy.datasets import open_data
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.identity.calibration import Calibration
    from mgn_deploy.identity.open_set import open_set_of
    from mgn_deploy.retrieval.evaluation import Protocol
    from mgn_deploy.retrieval.multi_query import needed_subsets
    from mgn_deploy.retrieval.validate import validate as run
    from mgn_deploy.retrieval.validate import validation_store

    protocol = Protocol(metric, cameras, aqe, dba, rerank, roc, single_shot, ci, seed, device)
    images = open_data(data, needed_subsets(multi_query))
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    original = Embedder.open_reference(bundle) if reference else None
    calibration = Calibration.find(embedder.bundle) if open_set else None
    kept = store or validation_store(embedder.bundle, images)
    if kept:
        say(f"embeddings are kept in {kept}: a run that is stopped goes on from there")
    with progress() as update:
        result = run(
            images,
            embedder,
            original,
            multi_query=multi_query,
            protocol=protocol,
            per_query=per_query,
            store=kept,
            reference_sample=reference_sample,
            batch_size=batch,
            progress=update,
        )
    found = None
    if open_set:
        assert result.embeddings is not None
        assert result.ranked is not None
        found = open_set_of(result.ranked, *result.embeddings, calibration=calibration, seed=seed)
    if json:
        notes = [*images.notes, *result.notes]
        asked = {"multi_query": multi_query, "notes": notes, "tolerance_points": tolerance}
        opened = {"open_set": found.to_dict()} if found else {}
        judged = {"protocol": protocol.to_dict(), **asked, "passed": result.passes(tolerance)}
        print_json({**result.to_dict(), **opened, **judged})
    else:
        pooled = f", multiple-query ({multi_query})" if multi_query else ""
        print_scores(
            f"{data}, {result.measured.queries} queries{pooled}; percent",
            {result.backend: result.measured_scores, "PyTorch": result.reference_scores},
            result.paired() if result.sample is None else {},
        )
        if result.sample:
            print_scores(
                f"of these, {result.sample.measured.queries} queries beside the reference; percent",
                {result.backend: result.sample.measured_scores, "PyTorch": result.sample.reference_scores},
                result.paired(),
            )
        if found:
            _print_open_set(found)
    result.require(tolerance)


def _print_open_set(found: OpenSet) -> None:
    rows = [
        [
            point.name,
            *(f"{value:.4f} ({low:.4f} to {high:.4f})" for value, low, high in [point.threshold]),
            *(f"{percent(value)} ({percent(low)} to {percent(high)})" for value, low, high in (point.fpir, point.dir)),
            point.problem or "",
        ]
        for point in found.points
    ]
    title = (
        f"open set: {found.enrolled} of {found.people} people enrolled, {found.mated:.0f} searches of them and "
        f"{found.non_mated:.0f} of others, {found.draws} draws; median and 95%, percent"
    )
    print_table(["threshold of", "threshold", "FPIR", "DIR, rank 1", "note"], rows, title=title)
