"""The routes of the service: FastAPI over `Service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mgn_deploy import __version__
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.serve.batching import Closed, Overloaded
from mgn_deploy.serve.gallery import Hit, NotShown
from mgn_deploy.serve.guard import Guard
from mgn_deploy.serve.service import Answer, Service
from mgn_deploy.serve.uploads import Crop, TooLarge, Upload, parse_crops
from mgn_deploy.serve.wire import (
    NPY,
    About,
    CompareAnswer,
    EmbedAnswer,
    Problem,
    SearchAnswer,
    StoreAnswer,
    npy,
    read_uploads,
)

T = TypeVar("T")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "boxes": {
                "type": "string",
                "description": "JSON: [[left, top, width, height], ...], one such list an image.",
            },
        },
    }
}
_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"image/*": _IMAGE, "multipart/form-data": _FORM}}
}
_CROPS: dict[str, Any] = {
    "requestBody": {"required": True, "content": {**_BODY["requestBody"]["content"], NPY: _IMAGE}}
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": why}
    for status, why in {
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "More bytes, pixels or images than the limits.",
        422: "No image of the request can be read, or a parameter is wrong.",
        503: "The queue is full; Retry-After says for how long, in seconds.",
    }.items()
}


def make_app(service: Service, *, key: str | None = None, any_host: bool = False) -> ASGIApp:
    """The ASGI application of a service: its routes behind their guard. It warms the engine up, and closes the service
    as it shuts down.

    Args:
        service: opened.
        key: that requests must show; None: none.
        any_host: answer under any host name without a key, too.
    """
    pool = ThreadPoolExecutor(service.limits.connections, thread_name_prefix="request")

    async def run(function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not service.ready:
            await run(service.warm_up)
        yield
        await run(service.close)
        pool.shutdown()

    app = FastAPI(
        title="mgn-deploy",
        version=__version__,
        summary="Person re-identification: embeddings and rank lists of crops.",
        docs_url=None,  # its page loads scripts from a CDN
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_error_answers(app)
    _add_page(app)
    _add_state(app, service, run)
    _add_questions(app, service, run)
    return Guard(app, limits=service.limits, key=key, metrics=service.metrics, any_host=any_host)


def _add_error_answers(app: FastAPI) -> None:
    def problem(status: int, sentence: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, {k.replace("_", "-"): v for k, v in headers.items()})

    @app.exception_handler(UserError)
    async def unusable(request: Request, error: UserError) -> JSONResponse:
        return problem(422, str(error))

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: TooLarge) -> JSONResponse:
        return problem(413, str(error))

    @app.exception_handler(NotShown)
    async def not_shown(request: Request, error: NotShown) -> JSONResponse:
        return problem(404, str(error))

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> JSONResponse:
        return problem(503, str(error), retry_after=str(error.retry_after))

    @app.exception_handler(Closed)
    async def closed(request: Request, error: Closed) -> JSONResponse:
        return problem(503, str(error), retry_after="5")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(422, f"{first['loc'][-1]}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.url.path}: {error.detail}"}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        return problem(500, "an error of the server's own: its log says more")


def _add_page(app: FastAPI) -> None:
    for path, (name, kind) in _PAGE.items():
        content = (files("mgn_deploy.serve") / "page" / name).read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

        app.add_api_route(path, page, include_in_schema=False, methods=["GET"])


def _add_state(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
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
        )

    @app.get("/store", summary="How far the gallery is", responses=_only(422))
    async def store() -> StoreAnswer:
        gallery = service.require_gallery()
        return StoreAnswer(name=_shown(gallery.store.folder.name), **await run(gallery.progress))

    @app.get("/thumbs/{key}", summary="A gallery image, small", responses={404: {"model": Problem}})
    async def thumbnail(key: str, request: Request) -> Response:
        gallery = service.require_gallery()
        tag = gallery.tag(key)
        headers = {"cache-control": "private, max-age=3600", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(await run(lambda: gallery.thumbnail(key)), media_type="image/jpeg", headers=headers)


def _add_questions(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
    embedder, limits = service.embedder, service.limits
    bundle_id = embedder.bundle.id

    @app.post(
        "/embed",
        summary="Embeddings of images, or of boxes in them",
        response_model=EmbedAnswer,
        responses=_PROBLEMS,
        openapi_extra=_CROPS,
    )
    async def embed(request: Request) -> Response:
        if request.headers.get("content-type") == NPY:
            crops = parse_crops(await request.body(), embedder.height, embedder.width, limits)
            answer = await run(lambda: service.embed_crops(list(crops)))
            return Response(npy(answer.rows), media_type=NPY, headers=_timing(answer) | {"mgn-bundle-id": bundle_id})
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)

        def answer_json() -> Response:
            answer = service.embed(uploads)
            rows = iter(answer.rows.tolist())
            crops = [{**_crop(crop), "embedding": None if crop.error else next(rows)} for crop in answer.crops]
            return _json({"bundle_id": bundle_id, "crops": crops}, answer)

        return await run(answer_json)

    @app.post(
        "/search",
        summary="The nearest gallery images",
        response_model=SearchAnswer,
        responses=_PROBLEMS,
        openapi_extra=_BODY,
    )
    async def search(
        request: Request,
        k: Annotated[int, Query(description="Most results.", ge=1)] = 10,
        camera: Annotated[list[int] | None, Query(description="Results of these cameras alone.")] = None,
    ) -> Response:
        service.require_gallery()
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)

        def answer_json() -> Response:
            answer = service.embed(uploads)
            lists = iter(service.search(answer, k, cameras=camera))
            crops = [
                {
                    **_crop(crop),
                    "results": None if crop.error else [_hit(n, hit) for n, hit in enumerate(next(lists), 1)],
                }
                for crop in answer.crops
            ]
            return _json({"bundle_id": bundle_id, "crops": crops}, answer)

        return await run(answer_json)

    @app.post(
        "/compare",
        summary="How alike two images are",
        response_model=CompareAnswer,
        responses=_PROBLEMS,
        openapi_extra=_BODY,
    )
    async def compare(request: Request) -> Response:
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)

        def answer_json() -> Response:
            answer = _two(service, uploads)
            return _json({"bundle_id": bundle_id, "similarity": float(answer.rows[0] @ answer.rows[1])}, answer)

        return await run(answer_json)


def _two(service: Service, uploads: list[Upload]) -> Answer:
    if sum(upload.count for upload in uploads) != 2:
        raise UserError("compare takes two images, or one image with two boxes")
    answer = service.embed(uploads)
    for crop in answer.crops:
        if crop.error:
            raise UserError(f"{_shown(crop.name)} cannot be read: {crop.error}")
    return answer


def _json(content: dict[str, Any], answer: Answer) -> Response:
    """The answer; 422 where not one image of the request could be read."""
    if not len(answer.rows):
        crop = answer.crops[0]
        more = f" (and {len(answer.crops) - 1} more)" if len(answer.crops) > 1 else ""
        return JSONResponse({"error": f"{_shown(crop.name)} cannot be read: {crop.error}{more}"}, 422)
    return JSONResponse(content, headers=_timing(answer))


def _timing(answer: Answer) -> dict[str, str]:
    return {"server-timing": ", ".join(f"{step};dur={1000 * took:.2f}" for step, took in answer.seconds.items())}


def _crop(crop: Crop) -> dict[str, Any]:
    return {"image": _shown(crop.name), "box": crop.box, "error": crop.error and _shown(crop.error)}


def _hit(rank: int, hit: Hit) -> dict[str, Any]:
    row = hit.row
    return {
        "rank": rank,
        "name": _shown(row.name),
        "similarity": round(hit.similarity, 6),
        "identity": row.identity,
        "camera": row.camera,
        "thumbnail": f"/thumbs/{hit.key}",
    }


def _shown(text: str) -> str:
    """As UTF-8 can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _refuse_fields(fields: dict[str, str]) -> None:
    for name in fields:
        raise UserError(f"the form has a field {name!r} that is not known: image and boxes are")


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _PROBLEMS[status] for status in statuses}
