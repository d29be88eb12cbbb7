"""`mgn-deploy search` and `mgn-deploy distmat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import Metric
from mgn_deploy.cli.options import AllowUnproven, Backend, Json, QueryBundle, out
from mgn_deploy.console import print_json, print_table, progress, say

if TYPE_CHECKING:
    from mgn_deploy.retrieval.rank_list import RankList

SHOWN_QUERIES = 20


def search(
    query: Annotated[Path, typer.Argument(help="An embedding store, or with --bundle an image or a folder of images.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours a query.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Also write a page of the rank lists, images inlined.")] = None,
    bundle: QueryBundle = None,
    backend: Backend = "auto",
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Show the nearest gallery images of each query."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.report.rank_page import gallery_facts, write_rank_page
    from mgn_deploy.retrieval.search import Queries
    from mgn_deploy.retrieval.search import search as run

    images = Store.open(gallery)
    lists = run(Queries.open(query, bundle, backend, allow_unproven=allow_unproven), images, k)
    if html is not None:
        write_rank_page(html, lists, title=f"{query.name} in {gallery.name}", facts=gallery_facts(images))
        say(f"{html}: {len(lists)} rank lists")
    if json:
        print_json([ranked.to_dict() for ranked in lists])
    else:
        _print_lists(lists)


def distmat(
    query: Annotated[Path, typer.Argument(help="Embedding store of the queries: the matrix's rows.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery: the matrix's columns.")],
    matrix: Annotated[Path, out("The .npy file to write, float32, queries by gallery.")],
    metric: Annotated[Metric, typer.Option(help="cosine is 1 - similarity.")] = "cosine",
    json: Json = False,
) -> None:
    """Write the distance matrix of two stores."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.search import write_store_distances

    with progress("distances") as update:
        shape = write_store_distances(Store.open(query), Store.open(gallery), matrix, metric, progress=update)
    if json:
        print_json({"matrix": str(matrix), "shape": shape, "dtype": "float32", "metric": metric})
    else:
        print(f"{matrix}: float32 {list(shape)}, {metric} distance")


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
