"""`mgn-deploy distmat` and `mgn-deploy search`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mgn_deploy.console import BACKENDS, print_json, print_table, progress, say
from mgn_deploy.errors import UserError

if TYPE_CHECKING:
    from mgn_deploy.retrieval.rank_list import RankList
    from mgn_deploy.retrieval.search import Queries

SHOWN_QUERIES = 20


class MetricName(str, Enum):
    cosine = "cosine"
    euclidean = "euclidean"


def distmat(
    query: Path = typer.Argument(help="Embedding store of the queries: the matrix's rows."),
    gallery: Path = typer.Argument(help="Embedding store of the gallery: the matrix's columns."),
    out: Path = typer.Option(..., "-o", "--out", help="The .npy file to write, float32 [queries, gallery]."),
    metric: MetricName = typer.Option(MetricName.cosine, help="cosine is 1 - similarity."),
) -> None:
    """Write the distance matrix of two stores, in their rows' order."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.distance import write_distance_matrix
    from mgn_deploy.retrieval.search import check_same_bundle

    queries, images = Store.open(query), Store.open(gallery)
    check_same_bundle(queries.manifest.bundle_id, images)
    with progress("distances") as update:
        write_distance_matrix(out, queries.embeddings(), images.embeddings(), metric.value, progress=update)
    print(f"{out}: float32 [{len(queries)}, {len(images)}], {metric.value} distance")


def search(
    query: Path = typer.Argument(help="An embedding store, or with --bundle an image or a folder of images."),
    gallery: Path = typer.Argument(help="Embedding store of the gallery."),
    k: int = typer.Option(10, "-k", min=1, help="Neighbours a query."),
    html: Path | None = typer.Option(None, help="Also write a page of the rank lists, images inlined."),
    bundle: Path | None = typer.Option(None, help="The bundle to embed image queries with."),
    backend: str = typer.Option("auto", help=f"Of image queries: {BACKENDS}"),
    allow_unproven: bool = typer.Option(False, help="Run an engine that the bundle has no passed proof for."),
    json: bool = typer.Option(False, "--json", help="Print the rank lists as JSON."),
) -> None:
    """Show the nearest gallery images of each query."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.report.rank_page import write_rank_page
    from mgn_deploy.retrieval.search import search as run_search

    images = Store.open(gallery)
    lists = run_search(open_queries(query, bundle, backend, allow_unproven), images, k)
    if html is not None:
        facts = {
            "Bundle": images.manifest.bundle_id[:12],
            "Backend": images.manifest.backend,
            "Gallery": f"{len(images):,} images",
        }
        write_rank_page(html, lists, title=f"{query.name} in {gallery.name}", facts=facts)
        say(f"{html}: {len(lists)} rank lists")
    if json:
        print_json([_as_json(ranked) for ranked in lists])
    else:
        _print_lists(lists)


def open_queries(query: Path, bundle: Path | None, backend: str, allow_unproven: bool = False) -> Queries:
    """Of a store, or of images that the bundle embeds."""
    from mgn_deploy.gallery.shards import MANIFEST
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.search import Queries

    if (query / MANIFEST).is_file():
        return Queries.of_store(Store.open(query))
    if bundle is None:
        raise UserError(f"{query} is no embedding store: give --bundle to search for an image or a folder of images")
    from mgn_deploy.embedder import Embedder

    return Queries.of_images(query, Embedder.open(bundle, backend, allow_unproven=allow_unproven))


def _as_json(ranked: RankList) -> dict[str, object]:
    return {
        "query": ranked.query.name,
        "identity": ranked.query.identity,
        "camera": ranked.query.camera,
        "results": [
            {
                "rank": rank,
                "name": result.name,
                "similarity": round(result.similarity or 0.0, 6),
                "identity": result.identity,
                "camera": result.camera,
            }
            for rank, result in enumerate(ranked.results, start=1)
        ],
    }


def _print_lists(lists: list[RankList]) -> None:
    rows = [
        [
            repr(ranked.query.name) if rank == 1 else "",
            str(rank),
            f"{result.similarity:.4f}",
            repr(result.name),
            "" if result.identity is None else str(result.identity),
            "" if result.camera is None else str(result.camera),
        ]
        for ranked in lists[:SHOWN_QUERIES]
        for rank, result in enumerate(ranked.results, start=1)
    ]
    print_table(["query", "rank", "similarity", "gallery image", "identity", "camera"], rows)
    if len(lists) > SHOWN_QUERIES:
        say(f"the first {SHOWN_QUERIES} of {len(lists)} queries; --json or --html for all")
