"""What the service is and has: `/about`, `/store`, thumbnails, metrics and health."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from mgn_deploy import __version__
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.serve.answers import About, Problem, StoreAnswer, only
from mgn_deploy.serve.service import Service
from mgn_deploy.serve.wire import shown


def add_state(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
    embedder, limits = service.embedder, service.limits

    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether requests are answered quickly", responses={503: {"model": Problem}})
    async def readyz() -> Response:
        if not service.ready or service.queue.reserved >= limits.queued:
            return JSONResponse({"error": "the queue is full"}, 503, {"retry-after": "2"})
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", summary="Counters, in Prometheus' text format")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/about", summary="The model, the engine and the limits")
    async def about() -> About:
        config = embedder.bundle.config
        return About(
            version=__version__,
            bundle_id=embedder.bundle.id,
            model=f"{config.backbone} MGN {config.height}x{config.width} {embedder.bundle.manifest.precision}",
            backend=embedder.backend.name,
            backend_version=embedder.backend.version,
            device=embedder.backend.device,
            height=embedder.height,
            width=embedder.width,
            dim=embedder.dim,
            preprocessing=PREPROCESSING,
            batch=service.queue.batch,
            max_images=limits.images,
            max_body_bytes=limits.body_bytes,
            gallery=service.gallery is not None,
            people=service.people is not None,
            calibrated=service.calibration is not None,
        )

    @app.get("/store", summary="How far the gallery is", responses=only(422))
    async def store() -> StoreAnswer:
        gallery = service.require_gallery()
        return StoreAnswer(name=shown(gallery.store.folder.name), **await run(gallery.progress))

    @app.get("/thumbs/{key}", summary="A gallery image, small", responses={404: {"model": Problem}})
    async def thumbnail(key: str, request: Request) -> Response:
        gallery = service.require_gallery()
        tag = gallery.tag(key)
        headers = {"cache-control": "private, max-age=3600", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(await run(lambda: gallery.thumbnail(key)), media_type="image/jpeg", headers=headers)
