"""What stands before the routes: who may ask, how large a body may be and how long it may take, and safe headers.

The whole body is read here, into memory and never to a disk, so no route meets a slow or an endless one.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mgn_deploy.choices import API_KEY
from mgn_deploy.errors import UserError
from mgn_deploy.serve.limits import Limits
from mgn_deploy.serve.metrics import Metrics

MIN_KEY = 16  # characters
# The page is the same for everyone; whoever watches the service needs no key to see that it lives.
OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz"})

_SAFE_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]


class _Refused(Exception):
    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Gone(Exception):
    """The client has left."""


class Guard:
    """ASGI middleware around the routes.

    Args:
        app: the routes.
        limits: of bodies.
        key: that requests must show as `Authorization: Bearer KEY` or `X-API-Key: KEY`; None: none, and then only
            requests to a loopback name are answered, which a page of another site cannot send (DNS rebinding).
        metrics: count the answers.
        any_host: answer to any name without a key, too.
    """

    def __init__(
        self, app: ASGIApp, *, limits: Limits, key: str | None, metrics: Metrics, any_host: bool = False
    ) -> None:
        self._app, self._limits, self._metrics, self._any_host = app, limits, metrics, any_host
        self._key = None if key is None else key.encode()
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # a client that left before it had an answer

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_safe_headers(message["headers"])}
            await send(message)

        held = 0
        try:
            headers = Headers(scope=scope)
            self._check_caller(scope, headers)
            body = await self._read(receive, headers)
            held = len(body)
            await self._app(scope, _replayed(body, receive), send_safely)
        except _Refused as refusal:
            await _answer(send_safely, refusal)
        except _Gone:
            pass
        finally:
            self._held -= held
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - start)

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._key is None and not self._any_host and not is_loopback(_host_name(host)):
            raise _Refused(421, "without an API key this service answers to localhost only")
        origin = headers.get("origin")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] not in OPEN_PATHS:
            raise _Refused(403, "pages of other sites may not ask this service")
        if origin is not None and urlsplit(origin).netloc != host:
            raise _Refused(403, "pages of other sites may not ask this service")
        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._shows_key(headers):
            raise _Refused(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", www_authenticate="Bearer"
            )

    def _shows_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return self._key is not None and hmac.compare_digest(shown.encode("latin-1"), self._key)

    async def _read(self, receive: Receive, headers: Headers) -> bytes:
        too_large = _Refused(
            413, f"the body is larger than the limit of {self._limits.body_bytes / (1 << 20):g} MiB", connection="close"
        )
        declared = headers.get("content-length", "0")
        if int(declared) > self._limits.body_bytes and "expect" in headers:
            raise too_large
        try:
            body = await asyncio.wait_for(self._receive(receive), self._limits.body_seconds)
        except asyncio.TimeoutError:
            raise _Refused(
                408, f"the body did not arrive within {self._limits.body_seconds:g} s", connection="close"
            ) from None
        if body is None:
            raise too_large
        return body

    async def _receive(self, receive: Receive) -> bytes | None:
        """The body; None where it is too large. What is too large is still read, and dropped, up to twice the limit:
        most clients see an answer only after they have sent everything."""
        parts: list[bytes] = []
        size = held = 0
        crowded = False
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                part = message.get("body", b"")
                size += len(part)
                crowded = crowded or self._held + len(part) > self._limits.held_bytes
                if crowded or size > self._limits.body_bytes:
                    parts.clear()
                    self._held -= held
                    held = 0
                else:
                    parts.append(part)
                    held += len(part)
                    self._held += len(part)
                if not message.get("more_body", False) or size > 2 * self._limits.body_bytes:
                    break
            if size > self._limits.body_bytes:
                return None
            if crowded:
                raise _Refused(503, "too many uploads at once: try again in 2 s", retry_after="2")
            body = b"".join(parts)
        except BaseException:
            self._held -= held
            raise
        return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_safe_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    given = list(headers)
    if not any(name == b"cache-control" for name, _ in given):
        given.append((b"cache-control", b"no-store"))
    return [*given, *_SAFE_HEADERS]


async def _answer(send: Send, refusal: _Refused) -> None:
    body = json.dumps({"error": str(refusal)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _host_name(host: str) -> str:
    """Of a Host header, without its port."""
    return urlsplit(f"//{host}").hostname or "" if host.isprintable() and "@" not in host else ""


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(key: str | None) -> None:
    """Raise UserError where a key is too short to be one."""
    if key is not None and (len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise UserError(
            f"{API_KEY} must be at least {MIN_KEY} printable ASCII characters: "
            "`python -c 'import secrets; print(secrets.token_urlsafe())'` makes one"
        )


def check_binding(host: str, key: str | None, insecure: bool) -> None:
    """Raise UserError where a service without a key could be reached from other machines."""
    if key is None and not insecure and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines: set {API_KEY}, listen on 127.0.0.1, or pass --insecure where "
            "something else guards it"
        )
