"""`mgn-deploy evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.cli.options import Json, RankDevice, Seed
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
    print_scores,
)
from mgn_deploy.console import print_json, progress


def evaluate(
    query: Annotated[Path, typer.Argument(help="Embedding store of the queries, with labels.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery, with labels; may be the same.")],
    against: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="QUERY GALLERY", help="Stores of the same images to compare with, query by query."),
    ] = None,
    junk: Annotated[
        list[int] | None, typer.Option(help="An identity that is ignored; Market-1501's is -1. By default none.")
    ] = None,
    distractor: Annotated[
        list[int] | None, typer.Option(help="An identity that is nobody; Market-1501's is 0. By default none.")
    ] = None,
    metric: MetricOption = "cosine",
    cameras: Cameras = True,
    rerank: Rerank = False,
    aqe: Aqe = 0,
    dba: Dba = 0,
    roc: RocOption = False,
    single_shot: SingleShotOption = False,
    ci: Intervals = False,
    per_query: PerQuery = None,
    index: NoIndex = None,
    device: RankDevice = "cpu",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure two labelled stores, as `validate` measures images.

    Over exact neighbours and never through an index. Every number is a person's, 0 and -1 too, unless --junk or
    --distractor names it.
    """
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.evaluate_stores import evaluate_stores
    from mgn_deploy.retrieval.evaluation import Protocol, write_per_query

    protocol = Protocol(metric, cameras, aqe, dba, rerank, roc, single_shot, ci, seed, device)
    with progress() as update:
        result = evaluate_stores(
            Store.open(query),
            Store.open(gallery),
            against=(Store.open(against[0]), Store.open(against[1])) if against else None,
            junk=junk or (),
            distractors=distractor or (),
            protocol=protocol,
            progress=update,
        )
    if per_query is not None:
        reranked = result.scores.reranked
        of_each = {"": result.scores.metrics.scores, "reranked_": reranked.scores if reranked else None}
        of_each["against_"] = result.against.metrics.scores if result.against else None
        write_per_query(per_query, result.names, result.identities, of_each)
    if json:
        print_json({**result.to_dict(), "protocol": protocol.to_dict()})
    else:
        print_scores(
            f"{query} in {gallery}, {result.scores.metrics.queries} queries; percent",
            {query.name: result.scores, f"against {against[0].name}" if against else "": result.against},
            result.paired(),
        )
