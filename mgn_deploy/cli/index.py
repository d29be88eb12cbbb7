"""`mgn-deploy index`: approximate search for stores that outgrow exact search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.choices import IndexKind
from mgn_deploy.cli.options import Json, Seed, out
from mgn_deploy.console import print_result, progress

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Build indexes for approximate search.")


@app.callback()
def _group() -> None:
    """Keep `build` a command of its own: Typer runs the only command of a group without its name."""


@app.command(epilog="Example:\n\nmgn-deploy index build store -o index --kind hnsw")
def build(
    store: Annotated[Path, typer.Argument(help="The embedding store.")],
    index: Annotated[str, out("The folder to write; for Milvus file.db or http://HOST:19530.")],
    kind: Annotated[
        IndexKind, typer.Option(help="Of index; auto: flat, hnsw or ivf-pq by the store's size, or milvus by -o.")
    ] = "auto",
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the exact 10 nearest that must be found.")
    ] = 0.95,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Build an index of a store for `search --index`.

    Its recall@10 is measured against exact search. Exit code 1, and no index, where it is below --recall.
    """
    from mgn_deploy.gallery.store import Store
    from mgn_deploy.index.build import build_index

    with progress("rows") as update:
        made = build_index(Store.open(store), index, kind, recall=recall, seed=seed, progress=update)
    print_result(
        json,
        {"index": index, **made.model_dump()},
        f"{index}: {made.kind} of {made.rows:,} rows, recall@10 {made.recall_at_10:.4f} against exact search over "
        f"{made.recall_queries:,} rows",
    )
