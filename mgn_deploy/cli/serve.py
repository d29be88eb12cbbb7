"""`mgn-deploy serve`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mgn_deploy.choices import MAX_BATCH
from mgn_deploy.cli.options import AllowUnproven, Backend, Bundle, Json
from mgn_deploy.console import print_result, say

_limit = partial(typer.Option, rich_help_panel="Limits")


def serve(
    bundle: Bundle,
    store: Annotated[Path | None, typer.Option(help="Embedding store of the gallery; it may still grow.")] = None,
    people: Annotated[Path | None, typer.Option(help="Folder of enrolled people; made where there is none.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other machines without MGN_DEPLOY_API_KEY.")
    ] = False,
    backend: Backend = "auto",
    allow_unproven: AllowUnproven = False,
    batch: Annotated[int, _limit(min=1, max=MAX_BATCH, help="Most images a call of the engine.")] = 8,
    max_wait: Annotated[float, _limit(min=0, help="Most ms that an image waits for others.")] = 5,
    max_queue: Annotated[int, _limit(min=1, help="Most images taken and not answered; then 503.")] = 256,
    max_upload: Annotated[float, _limit(min=0.001, help="Most MiB a request; then 413.")] = 32,
    max_images: Annotated[int, _limit(min=1, help="Most images a request, boxes counted; then 413.")] = 64,
    max_pixels: Annotated[float, _limit(min=0.001, help="Most megapixels an image; then 413.")] = 40,
    json: Json = False,
) -> None:
    """Serve embeddings, searches and a page over HTTP.

    Ctrl-C and SIGTERM end it once what was taken is answered. Where MGN_DEPLOY_API_KEY is set, callers show that key.
    """
    from mgn_deploy.packages import require_serving

    require_serving()
    from mgn_deploy.embedder import Embedder
    from mgn_deploy.serve.limits import Limits
    from mgn_deploy.serve.server import HttpServer
    from mgn_deploy.serve.service import Service

    limits = Limits(
        batch=batch,
        wait_seconds=max_wait / 1000,
        queued=max_queue,
        body_bytes=round(max_upload * (1 << 20)),
        images=max_images,
        pixels=round(max_pixels * 1e6),
    )
    embedder = Embedder.open(bundle, backend, allow_unproven=allow_unproven)
    engine = embedder.backend
    say(f"{bundle} on {engine.name} {engine.version} ({engine.device}), {embedder.proof}")

    server = HttpServer(Service(embedder, store, people, limits=limits), host, port, insecure=insecure)

    def started() -> None:
        say(f"the page: {server.address}/ (Ctrl-C ends it)")
        print_result(json, {"address": server.address}, server.address)
        sys.stdout.flush()  # whoever started it waits for the address

    server.run(started)
