"""The routes of the service: FastAPI over `Service`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mgn_deploy import __version__
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import DEFAULT_FAR, Calibration, Decision
from mgn_deploy.identity.compare import compare
from mgn_deploy.identity.identify import identify
from mgn_deploy.identity.people import check_name
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.serve.batching import Closed, Overloaded
from mgn_deploy.serve.gallery import Hit, NotShown
from mgn_deploy.serve.guard import Guard
from mgn_deploy.serve.service import Answer, Service
from mgn_deploy.serve.uploads import Crop, TooLarge, image_hash, parse_crops
from mgn_deploy.serve.wire import (
    NPY,
    About,
    CompareAnswer,
    EmbedAnswer,
    EnrolAnswer,
    IdentifyAnswer,
    PeopleAnswer,
    PersonAnswer,
    Problem,
    SearchAnswer,
    StoreAnswer,
    npy,
    read_uploads,
)

T = TypeVar("T")
Far = Annotated[float, Query(description="False-accept rate at which the threshold is drawn.", gt=0, lt=1)]
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_FORM: dict[str, Any] = {
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
_NAMED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    **_FORM["schema"],
                    "required": ["name", "image"],
                    "properties": {**_FORM["schema"]["properties"], "name": {"type": "string"}},
                }
            }
        },
    }
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
    _add_people(app, service, run)
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
            people=service.people is not None,
            calibrated=service.calibration is not None,
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

    @app.post("/embed", summary="Embeddings of images, or of boxes in them", **_asks(EmbedAnswer, _CROPS))
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

    @app.post("/search", summary="The nearest gallery images", **_asks(SearchAnswer))
    async def search(
        request: Request,
        k: Annotated[int, Query(description="Most results.", ge=1)] = 10,
        camera: Annotated[list[int] | None, Query(description="Results of these cameras alone.")] = None,
        far: Far = DEFAULT_FAR,
    ) -> Response:
        service.require_gallery()
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)

        def answer_json() -> Response:
            decision = service.calibration and service.calibration.decide(far)
            answer = service.embed(uploads)
            lists = iter(service.search(answer, k, cameras=camera))
            crops = [
                {**_crop(crop), "results": None if crop.error else _hits(next(lists), service.calibration)}
                for crop in answer.crops
            ]
            return _json({"bundle_id": bundle_id, "crops": crops, **_drawn(decision)}, answer)

        return await run(answer_json)

    @app.post("/compare", summary="Whether two images show one person", **_asks(CompareAnswer))
    async def compare_two(request: Request, far: Far = DEFAULT_FAR) -> Response:
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)
        if sum(upload.count for upload in uploads) != 2:
            raise UserError("compare takes two images, or one image with two boxes")

        def answer_json() -> Response:
            answer = _all_readable(service.embed(uploads))
            found = compare(*answer.rows, service.calibration, far=far)
            return _json({"bundle_id": bundle_id, **found.to_dict()}, answer)

        return await run(answer_json)


def _add_people(app: FastAPI, service: Service, run: Callable[..., Any]) -> None:
    limits, bundle_id = service.limits, service.embedder.bundle.id

    @app.post("/identify", summary="Who of the enrolled people it is, or nobody", **_asks(IdentifyAnswer))
    async def identify_crops(
        request: Request,
        far: Far = DEFAULT_FAR,
        together: Annotated[bool, Query(description="All images show one person.")] = False,
    ) -> Response:
        people = service.require_people()
        uploads, fields = await read_uploads(request, limits)
        _refuse_fields(fields)

        def answer_json() -> Response:
            enrolled = people.load()
            answer = service.embed(uploads)
            names = [_shown(crop.name) for crop in answer.crops if not crop.error]
            answers = (
                identify(answer.rows, enrolled, service.calibration, names=names, far=far, together=together)
                if len(answer.rows) and enrolled.people
                else []
            )
            found = {"crops": [_crop(crop) for crop in answer.crops], "answers": [one.to_dict() for one in answers]}
            return _json({"bundle_id": bundle_id, **found}, answer)

        return await run(answer_json)

    @app.post(
        "/enrol",
        summary="Enrol a person by images; one that cannot be read and nothing is changed",
        **_asks(EnrolAnswer, _NAMED),
    )
    async def enrol(request: Request) -> Response:
        people = service.require_people()
        uploads, fields = await read_uploads(request, limits)
        name = check_name(fields.pop("name", ""))
        _refuse_fields(fields)

        def answer_json() -> Response:
            answer = _all_readable(service.embed(uploads))
            hashes = [image_hash(upload, box) for upload in uploads for box in upload.boxes or [None]]
            with enrolling:
                before = next((len(one.images) for one in people.load().people if one.name == name), 0)
                person = people.folder.enrol(name, answer.rows, hashes)
            return _json({**person.to_dict(), "added": len(person.images) - before}, answer)

        return await run(answer_json)

    enrolling = threading.Lock()  # for the number of new images alone: the folder has a lock of its own

    @app.get("/people", summary="Who is enrolled", responses=_only(422))
    async def list_people() -> PeopleAnswer:
        enrolled = await run(service.require_people().load)
        return PeopleAnswer(people=[PersonAnswer(**person.to_dict()) for person in enrolled.people])

    @app.delete("/people", summary="Forget a person", responses=_only(422))
    async def forget(name: str) -> PersonAnswer:
        people = service.require_people()
        return PersonAnswer(**(await run(lambda: people.folder.remove(name))).to_dict())


def _all_readable(answer: Answer) -> Answer:
    for crop in answer.crops:
        if crop.error:
            raise UserError(f"{_shown(crop.name)} cannot be read: {_shown(crop.error)}")
    return answer


def _drawn(decision: Decision | None) -> dict[str, Any]:
    """A threshold as the answers give it."""
    if decision is None:
        return {"far": None, "threshold": None, "note": None}
    return {"far": decision.far, "threshold": decision.threshold, "note": decision.problem}


def _asks(answer: type[BaseModel], body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What OpenAPI is told of a route that takes images."""
    return {"response_model": answer, "responses": _PROBLEMS, "openapi_extra": body or _BODY}


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


def _hits(hits: list[Hit], calibration: Calibration | None) -> list[dict[str, Any]]:
    similarities = np.array([hit.similarity for hit in hits])
    probabilities = [None] * len(hits) if calibration is None else calibration.probability(similarities).tolist()
    return [
        {
            "rank": rank,
            "name": _shown(hit.row.name),
            "similarity": round(hit.similarity, 6),
            "probability": probability,
            "identity": hit.row.identity,
            "camera": hit.row.camera,
            "thumbnail": f"/thumbs/{hit.key}",
        }
        for rank, (hit, probability) in enumerate(zip(hits, probabilities, strict=True), 1)
    ]


def _shown(text: str) -> str:
    """As UTF-8 can carry it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _refuse_fields(fields: dict[str, str]) -> None:
    for name in fields:
        raise UserError(f"the form has a field {name!r} that is not known: image and boxes are")


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _PROBLEMS[status] for status in statuses}
