"""`mgn-deploy embed`."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path

import typer

from mgn_deploy.console import BACKENDS, print_json, progress, say

SHOWN_FAILURES = 10


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"


def embed(
    folder: Path = typer.Argument(help="Folder of images, searched recursively."),
    store: Path = typer.Option(..., "-o", "--out", help="The embedding store to write or to go on with."),
    bundle: Path = typer.Option(..., help="The bundle to embed with."),
    backend: str = typer.Option("auto", help=BACKENDS),
    batch: int = typer.Option(8, min=1, max=4096, help="Images an engine call."),
    dtype: Dtype = typer.Option(Dtype.float32, help="Of the stored embeddings."),
    max_failures: int | None = typer.Option(None, min=0, help="Stop after more unreadable images than this."),
    allow_unproven: bool = typer.Option(False, help="Run an engine that the bundle has no passed proof for."),
    json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Embed every image below a folder into a store; run again, it goes on where it stopped."""
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.gallery.embed import embed_folder

    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    say(f"{bundle} on {embedder.backend.name} {embedder.backend.version} ({embedder.backend.device})")
    start = time.monotonic()
    try:
        with progress() as update:
            report = embed_folder(
                folder, store, embedder, batch_size=batch, dtype=dtype.value, max_failures=max_failures, progress=update
            )
    except KeyboardInterrupt:
        say(f"interrupted: what was embedded is in {store}, and the same command goes on from there")
        raise
    seconds = time.monotonic() - start
    for name, reason in report.failed[:SHOWN_FAILURES]:
        say(f"cannot be read: {name!r}: {reason}")
    if len(report.failed) > SHOWN_FAILURES:
        say(f"... and {len(report.failed) - SHOWN_FAILURES} more, in the store's Parquet with their reasons")
    if report.gone:
        say(f"{report.gone} images of the store are no longer in {str(folder)!r}; they stay in the store")
    rate = report.embedded / seconds
    if json:
        print_json(
            {
                "store": str(store),
                "embedded": report.embedded,
                "unchanged": report.unchanged,
                "failed": len(report.failed),
                "gone": report.gone,
                "seconds": round(seconds, 3),
                "images_per_second": round(rate, 2),
                "backend": embedder.backend.name,
            }
        )
    elif not report.embedded and not report.failed:
        print(f"{store}: nothing to do, all {report.unchanged} images are in it")
    else:
        print(
            f"{store}: {report.embedded} embedded in {seconds:.1f} s ({rate:.1f} images/s), "
            f"{report.unchanged} already there, {len(report.failed)} failed"
        )
