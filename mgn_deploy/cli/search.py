"""`mgn-deploy search` and `mgn-deploy distmat`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import Compute, Metric
from mgn_deploy.cli.options import AllowUnproven, Backend, Json, QueryBundle, RankDevice, out
from mgn_deploy.console import print_json, print_result, print_table, progress, say

if TYPE_CHECKING:
    from mgn_deploy.retrieval.rank_list import RankList

SHOWN_QUERIES = 20


def search(
    query: Annotated[Path, typer.Argument(help="An embedding store, an image or a folder of images.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours a query.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Also write a page of the rank lists, images inlined.")] = None,
    bundle: QueryBundle = None,
    backend: Backend = "auto",
    allow_unproven: AllowUnproven = False,
    labels: Annotated[
        str,
        typer.Option(
            metavar="none|market1501|FILE.csv",
            help="Who is on queries that are images, in the gallery's numbers; rows of stores have their own labels.",
        ),
    ] = "none",
    exclude_same_camera: Annotated[
        bool,
        typer.Option("--exclude-same-camera", help="Leave out the query's person by its own camera, and junk (-1)."),
    ] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank by k-reciprocal neighbours.")] = False,
    aqe: Annotated[int, typer.Option(min=0, help="Expand a query by so many neighbours first; 0: by none.")] = 0,
    index: Annotated[
        str | None,
        typer.Option(help="Search by this index (see `index build`); re-ranking and mAP need exact neighbours."),
    ] = None,
    camera: Annotated[int | None, typer.Option(help="With --index: only gallery images by this camera.")] = None,
    since: Annotated[
        float | None, typer.Option(help="With --index: only rows of videos, from this second of the video on.")
    ] = None,
    until: Annotated[float | None, typer.Option(help="With --index: only rows of videos, up to this second.")] = None,
    device: RankDevice = "cpu",
    far: Annotated[
        float, typer.Option("--far", help="Where the bundle has a calibration: share of wrong pairs above the line.")
    ] = 1e-3,
    prior: Annotated[
        float | None, typer.Option(help="Share of pairs that are one person; without it estimated from the gallery.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the nearest gallery images of each query.

    Nothing is left out but the query's own file, unless --exclude-same-camera asks for it. With a bundle that is
    calibrated each result has a probability.
    """
    from mgn_deploy.errors import UserError
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.identity.ranked import judge_by_bundle
    from mgn_deploy.index.build import open_index
    from mgn_deploy.report.rank_page import gallery_facts, write_rank_page
    from mgn_deploy.retrieval.queries import Queries
    from mgn_deploy.retrieval.search import search as run

    for option, value in (("--camera", camera), ("--since", since), ("--until", until)):
        if value is not None and index is None:
            raise UserError(f"{option} is what an index filters by: give --index as well")
    images = Store.open(gallery)
    queries = Queries.open(query, bundle, backend, allow_unproven=allow_unproven, labels=labels, gallery=images)
    index_opened = (
        nullcontext() if index is None else open_index(index, images, camera=camera, since=since, until=until)
    )
    with index_opened as candidates, progress("steps") as update:
        lists = run(
            queries,
            images,
            k,
            exclude_same_camera=exclude_same_camera,
            rerank=rerank,
            aqe=aqe,
            candidates=candidates,
            device=device,
            progress=update,
        )
    lists, judged = judge_by_bundle(lists, bundle, images, far=far, prior=prior, expanded=aqe > 0)
    if html is not None:
        facts = gallery_facts(images)
        write_rank_page(html, lists, title=f"{query.name} in {gallery.name}", facts=facts, judged=judged)
        say(f"{html}: {len(lists)} rank lists")
    if json:
        by = {} if judged is None else {"judged": judged.to_dict()}
        print_json([{**ranked.to_dict(), **by} for ranked in lists])
    else:
        _print_lists(lists)


def distmat(
    query: Annotated[Path, typer.Argument(help="Embedding store of the queries: the matrix's rows.")],
    gallery: Annotated[Path, typer.Argument(help="Embedding store of the gallery: the matrix's columns.")],
    matrix: Annotated[Path, out("The .npy file to write, float32, queries by gallery.")],
    metric: Annotated[Metric, typer.Option(help="cosine is 1 - similarity, 0 to 2.")] = "cosine",
    device: RankDevice = "cpu",
    compute: Annotated[
        Compute, typer.Option(help="Products in float32, or faster in tf32 or float16 on CUDA; sums in float32.")
    ] = "float32",
    memory: Annotated[int, typer.Option(min=1, help="MiB of a tile of distances, with its embeddings.")] = 256,
    json: Json = False,
) -> None:
    """Write the distance matrix of two stores.

    The largest error is measured on a sample against float64 and printed.
    """
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.retrieval.arrays import Arrays
    from mgn_deploy.retrieval.distance import measured_error
    from mgn_deploy.retrieval.search import write_store_distances

    arrays = Arrays.open(device, compute)
    rows, columns = Store.open(query), Store.open(gallery)
    with progress("distances") as update:
        shape = write_store_distances(
            rows, columns, matrix, metric, tile_bytes=memory << 20, device=arrays, progress=update
        )
    error = measured_error(rows.embeddings(), columns.embeddings(), metric, device=arrays)
    made = {
        "matrix": str(matrix), "shape": shape, "dtype": "float32", "metric": metric, "device": arrays.name,
        "compute": compute, "largest_error_on_a_sample": error,
    }  # fmt: skip
    told = f"{matrix}: float32 {list(shape)}, {metric} distance by {arrays.name} in {compute}, error {error:.1e}"
    print_result(json, made, told)


def _print_lists(lists: list[RankList]) -> None:
    rows = [
        [
            repr(ranked.query.name) if rank == 1 else "",
            str(rank),
            f"{result.similarity:.4f}",
            repr(result.name),
            "unknown" if result.identity is None else str(result.identity),
            "unknown" if result.camera is None else str(result.camera),
            *([] if result.distance is None else [f"{result.distance:.4f}"]),
            *([] if result.probability is None else [f"{result.probability:.3f}", "yes" if result.same else "no"]),
        ]
        for ranked in lists[:SHOWN_QUERIES]
        for rank, result in enumerate(ranked.results, start=1)
    ]
    columns = ["query", "rank", "similarity", "gallery image", "identity", "camera"]
    reranked = any(result.distance is not None for ranked in lists for result in ranked.results)
    judged = any(result.probability is not None for ranked in lists for result in ranked.results)
    columns += (["re-ranked distance"] if reranked else []) + (["probability", "above threshold"] if judged else [])
    print_table(columns, rows)
    if len(lists) > SHOWN_QUERIES:
        say(f"the first {SHOWN_QUERIES} of {len(lists)} queries; --json or --html for all")
