"""The routes of the service: FastAPI over `Service`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mgn_deploy import __version__
from mgn_deploy.errors import UserError
from mgn_deploy.serve.batching import Closed, Overloaded
from mgn_deploy.serve.gallery import NotShown
from mgn_deploy.serve.guard import Guard
from mgn_deploy.serve.people_routes import add_people
from mgn_deploy.serve.questions import add_questions
from mgn_deploy.serve.service import Service
from mgn_deploy.serve.state_routes import add_state
from mgn_deploy.serve.uploads import TooLarge
from mgn_deploy.serve.wire import shown

T = TypeVar("T")
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
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
    # Routes are tried in this order: what is asked most comes first.
    add_questions(app, service, run)
    add_people(app, service, run)
    add_state(app, service, run)
    _add_page(app)
    return Guard(app, limits=service.limits, key=key, metrics=service.metrics, any_host=any_host)


def _add_error_answers(app: FastAPI) -> None:
    def problem(status: int, sentence: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": shown(sentence)}, status, {k.replace("_", "-"): v for k, v in headers.items()})

    @app.exception_handler(UserError)
    async def unusable(request: Request, error: UserError) -> JSONResponse:
        # What this machine cannot write, as on a full disk, is no fault of the request.
        return problem(507 if isinstance(error.__cause__, OSError) else 422, str(error))

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
