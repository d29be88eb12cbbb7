"""uvicorn's HTTP/1.1 with an end to waiting: for headers, for a client that reads no answer, and for connections."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from mgn_deploy.serve.limits import Limits

_SENTENCE = b'{"error": "too many connections at once: try again in 2 s"}'
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 2\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_SENTENCE), _SENTENCE)
)


def guarded_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for these limits: uvicorn makes one for each connection and has no other way to pass them."""

    class GuardedProtocol(H11Protocol):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._header_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(cast(asyncio.Transport, transport))
            if len(self.connections) > limits.connections:
                self.transport.write(_BUSY)
                self.transport.close()
            else:
                self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop(self._header_timer)
            self._stop(self._write_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._stop(self._header_timer)
            self._header_timer = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop(self._write_timer)
            super().resume_writing()

        def _watch_headers(self) -> None:
            """From the first byte of a request, or the connection's start, until its headers are whole."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop(self._header_timer)
                self._header_timer = None
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(limits.header_seconds, self.transport.abort)

        @staticmethod
        def _stop(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return GuardedProtocol
