"""`mgn-deploy cluster` and `mgn-deploy map`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgn_deploy.choices import ClusterDistance, Projection
from mgn_deploy.cli.options import Json, Seed, out
from mgn_deploy.console import print_json, print_result, progress, say

if TYPE_CHECKING:
    from mgn_deploy.identity.clusters import Clusters


def cluster(
    store: Annotated[Path, typer.Argument(help="Embedding store of the images.")],
    table: Annotated[Path, out("The Parquet file to write: path, cluster, identity, camera.")],
    html: Annotated[Path | None, typer.Option(help="Also write a page of the groups, images inlined.")] = None,
    distance: Annotated[
        ClusterDistance, typer.Option(help="Of k-reciprocal neighbours (jaccard), or 1 - similarity.")
    ] = "jaccard",
    eps: Annotated[
        float | None, typer.Option(help="How far two images of one person may be, 0 to 1; without it by distance.")
    ] = None,
    min_images: Annotated[int, typer.Option(help="Images within eps of one, itself too, that begin a group.")] = 2,
    json: Json = False,
) -> None:
    """Group a store's images by person, without labels.

    Where the store has labels, the groups are compared with them.
    """
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.identity.clusters import cluster_store, write_clusters
    from mgn_deploy.report.group_page import write_group_page

    with progress("steps") as update:
        made = cluster_store(Store.open(store), distance=distance, eps=eps, min_images=min_images, progress=update)
    write_clusters(made, table)
    if html is not None:
        write_group_page(html, made, title=f"Who appears in {store.name}")
        say(f"{html}: {len(made)} groups")
    if json:
        print_json({"table": str(table), "html": None if html is None else str(html), **made.to_dict()})
    else:
        _print_clusters(made, table)


def map_embeddings(
    store: Annotated[Path, typer.Argument(help="Embedding store of the images.")],
    page: Annotated[Path, out("The HTML page to write.")],
    projection: Annotated[Projection, typer.Option(help="umap needs the extra umap.")] = "pca",
    groups: Annotated[
        Path | None, typer.Option(help="Colour by the groups of this file of `cluster`; without it by label.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write Parquet for Embedding Atlas and FiftyOne, with vectors.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most images on the page; of more, as many are drawn.")] = 5000,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw a store's embeddings as a map, thumbnails on hover."""
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.identity.clusters import read_clusters
    from mgn_deploy.identity.embedding_map import map_store, write_map_table
    from mgn_deploy.report.map_page import write_map_page

    opened = Store.open(store)
    labels = None if groups is None else read_clusters(groups, opened)
    made = map_store(opened, projection, seed=seed)
    shown = write_map_page(page, made, title=f"Map of {store.name}", groups=labels, limit=limit, seed=seed)
    if export is not None:
        write_map_table(made, export, labels)
        say(f"{export}: {len(opened)} rows")
    drawn = {
        "page": str(page), "table": None if export is None else str(export), "images": len(opened), "shown": shown,
        "projection": projection, "explained": made.explained,
    }  # fmt: skip
    print_result(json, drawn, f"{page}: {shown} of {len(opened)} images by {projection}")


def _print_clusters(made: Clusters, table: Path) -> None:
    counts = made.to_dict()
    print(
        f"{table}: {counts['clusters']} groups of {counts['images']} images, {counts['in_none']} in none, the largest "
        f"of {counts['largest']} ({made.distance} distance, eps {made.eps:g})"
    )
    if made.agreement:
        labels = made.agreement
        print(
            f"with the labels of {labels.images} images of {labels.people} people: adjusted Rand index "
            f"{labels.ari:.3f}, NMI {labels.nmi:.3f}, pairs: precision {labels.precision:.3f}, recall "
            f"{labels.recall:.3f}, F {labels.f1:.3f}"
        )
