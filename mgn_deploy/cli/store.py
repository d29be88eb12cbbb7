"""`mgn-deploy store`: what is done to an embedding store besides adding rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.cli.options import AllowUnproven, BoxClass, BoxesFile, Json, MinScore, Video, out
from mgn_deploy.console import print_json, print_result, print_table, progress

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Look at embedding stores, check, mend, join and export them."
)
StoreFolder = Annotated[Path, typer.Argument(help="The embedding store.")]


@app.command(epilog="Example:\n\nmgn-deploy store info store")
def info(store: StoreFolder, json: Json = False) -> None:
    """Show what is in a store and what made it."""
    from mgn_deploy.gallery.store import Store

    opened = Store.open(store)
    made = opened.manifest
    facts = {
        "images": len(opened),
        "failures": len(opened.failures),
        "identities": len({row.identity for row in opened} - {None}),
        "cameras": len({row.camera for row in opened} - {None}),
        "dim": made.dim,
        "dtype": made.dtype,
        "source": made.source,
        "bundle_id": made.bundle_id,
        "backend": made.backend,
        "preprocessing": made.preprocessing,
        "shards": len(made.shards),
        "schema_version": made.schema_version,
        "errors": dict(Counter(row.error for row in opened.failures).most_common(10)),
    }
    if json:
        print_json(facts)
    else:
        print_table(["", "value"], [[key, str(value)] for key, value in facts.items()], title=str(store))


@app.command(epilog="Example:\n\nmgn-deploy store verify store")
def verify(store: StoreFolder, json: Json = False) -> None:
    """Compare every byte with the checksums.

    Exit code 1 where one differs.
    """
    from mgn_deploy.errors import GateFailed
    from mgn_deploy.gallery.maintain import verify as run

    found = run(store)
    if json:
        print_json(found.to_dict())
    else:
        print(f"{store}: {found.rows} rows in {found.shards - len(found.damaged)} of {found.shards} shards are whole")
        if found.without_hash:
            print(f"{found.without_hash} shards have no checksum (schema 1): `embed` adds them when it next runs")
        for damage in found.damaged:
            print(f"{damage.rows if damage.rows is not None else 'unknown'} rows: {damage.reason}")
    if found.damaged:
        raise GateFailed(f"{len(found.damaged)} shards are damaged: `mgn-deploy store repair {store}` makes them again")


@app.command(epilog="Example:\n\nmgn-deploy store repair store")
def repair(
    store: StoreFolder,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="The bundle that embedded it; without it where it was then.")
    ] = None,
    allow_unproven: AllowUnproven = False,
    json: Json = False,
) -> None:
    """Drop damaged shards, and embed their images again.

    Where even their names are damaged, or the bundle is gone, the `embed` that made the store embeds what is missing.
    """
    from mgn_deploy.errors import first_names
    from mgn_deploy.gallery.maintain import repair as run

    with progress() as update:
        dropped, again = run(store, bundle, allow_unproven=allow_unproven, progress=update)
    if json:
        made = again.to_dict() if again else None
        print_json({"store": str(store), "dropped": [damage.to_dict() for damage in dropped], "embedded_again": made})
        return
    for damage in dropped:
        images = f" ({first_names([repr(row.name) for row in damage.known])})" if damage.known else ""
        print(f"dropped {damage.rows if damage.rows is not None else 'unknown'} rows: {damage.reason}{images}")
    if again:
        print(f"{store}: {again.embedded} embedded again, {len(again.failed)} failed")
    if not dropped:
        print(f"{store}: nothing to repair")
    elif not again or any(not damage.known for damage in dropped):
        print(f"run the `mgn-deploy embed ... -o {store}` that made it again: it embeds what is missing")


@app.command(epilog="Example:\n\nmgn-deploy store prune store photos")
def prune(
    store: StoreFolder,
    source: Annotated[
        list[str] | None, typer.Argument(help="What was embedded, with the options that `embed` was given.")
    ] = None,
    boxes: BoxesFile = None,
    video: Video = None,
    box_class: BoxClass = ["person"],  # noqa: B006
    min_score: MinScore = 0.0,
    root: Annotated[str | None, typer.Option(help="As of `embed`.")] = None,
    json: Json = False,
) -> None:
    """Remove the rows of images that are no longer in the source."""
    from mgn_deploy.gallery.inputs import open_inputs
    from mgn_deploy.gallery.maintain import prune as run

    found = open_inputs(source or [], root=root, boxes=boxes, classes=box_class, min_score=min_score, video=video)
    removed = run(store, [file.name for file in found.files])
    print_result(json, {"store": str(store), "removed": removed}, f"{store}: {removed} images removed")


@app.command(epilog="Example:\n\nmgn-deploy store relocate store /mnt/photos")
def relocate(
    store: StoreFolder,
    source: Annotated[str, typer.Argument(help="The folder (or URI) that the images are in now.")],
    json: Json = False,
) -> None:
    """Say where a store's images are now."""
    from mgn_deploy.gallery.relocate import relocate as run

    there, total = run(store, source)
    made = {"store": str(store), "source": source, "found": there, "images": total}
    print_result(json, made, f"{store}: its source is {source}, where {there} of its {total} images are")


@app.command(epilog="Example:\n\nmgn-deploy store merge part-0 part-1 -o store")
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of one source and bundle.")],
    merged: Annotated[Path, out("The new store.")],
    json: Json = False,
) -> None:
    """Join stores that `embed --shard` made into one."""
    from mgn_deploy.gallery.maintain import merge as run

    rows = run(stores, merged)
    print_result(json, {"store": str(merged), "rows": rows}, f"{merged}: {rows} rows of {len(stores)} stores")


@app.command("pool-tracks", epilog="Example:\n\nmgn-deploy store pool-tracks store -o tracks")
def pool_tracks(
    store: StoreFolder,
    tracks: Annotated[Path, out("The new store.")],
    best: Annotated[int, typer.Option(min=1, help="Most images that are taken of a track: the largest, sharpest.")] = 8,
    json: Json = False,
) -> None:
    """Pool each track's best images into one embedding.

    The row of a track is that of its best image; taken.parquet in the new store names all images that were taken.
    """
    from mgn_deploy.gallery.tracks import pool_tracks as run

    with progress() as update:
        pooled = run(store, tracks, best=best, progress=update)
    made = {"store": str(tracks), **vars(pooled)}
    print_result(json, made, f"{tracks}: {pooled.tracks} tracks, of {pooled.taken} of {pooled.images} images")


@app.command(epilog="Example:\n\nmgn-deploy store compact store")
def compact(store: StoreFolder, json: Json = False) -> None:
    """Rewrite a store without the rows that later ones replaced."""
    from mgn_deploy.gallery.maintain import compact as run

    before, after = run(store)
    made = {"store": str(store), "rows_before": before, "rows": after}
    print_result(json, made, f"{store}: {after} rows, {before - after} replaced ones removed")


@app.command(epilog="Example:\n\nmgn-deploy store export store -o gallery.parquet")
def export(
    store: StoreFolder,
    file: Annotated[Path, out("The file to write: .parquet, .npy or .csv.")],
    json: Json = False,
) -> None:
    """Write the embeddings to one file for other tools."""
    from mgn_deploy.gallery.export import export_store
    from mgn_deploy.gallery.store import Store

    opened = Store.open(store)
    path, rows, dim, dtype = export_store(opened, file), len(opened), opened.manifest.dim, opened.manifest.dtype
    made = {"file": str(path), "rows": rows, "dim": dim, "dtype": dtype}
    print_result(json, made, f"{path}: {rows} embeddings of {dim} {dtype}")
