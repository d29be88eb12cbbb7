"""The service on a socket: uvicorn with limits, until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from mgn_deploy.choices import API_KEY
from mgn_deploy.errors import UserError
from mgn_deploy.interrupt import SIGNALS
from mgn_deploy.serve.app import make_app
from mgn_deploy.serve.guard import check_binding, check_key
from mgn_deploy.serve.protocol import guarded_protocol
from mgn_deploy.serve.service import Service


class HttpServer:
    """A service on a socket. The API key is that of the environment variable MGN_DEPLOY_API_KEY; without one only this
    machine is served. It owns the service, and closes it.

    Attributes:
        address: as in http://127.0.0.1:8000.

    Args:
        service: opened.
        host: an address of this machine.
        port: 0 picks a free one.
        insecure: listen to other machines without a key.

    Raises:
        UserError: no key for an address that others reach, a key that is too short, an address that is in use.
    """

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000, *, insecure: bool = False) -> None:
        key = os.environ.get(API_KEY) or None
        self._service = service
        try:
            check_key(key)
            check_binding(host, key, insecure)
            self._listener = _listen(host, port)
        except BaseException:
            service.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._listener.getsockname()[1]}"
        limits = service.limits
        self._server = _Server(
            uvicorn.Config(
                make_app(service, key=key, any_host=insecure),
                http=guarded_protocol(limits),
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(limits.idle_seconds)),
                timeout_graceful_shutdown=max(1, round(limits.shutdown_seconds)),
            )
        )

    def run(self, started: Callable[[], None] | None = None) -> None:
        """Serve until SIGTERM, Ctrl-C or `stop`, and finish what was taken.

        Args:
            started: called once connections are accepted.
        """
        for name in ("uvicorn.error", "python_multipart"):  # broken requests are the client's, and answered
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._listener:
            try:
                self._service.warm_up()  # here, where what the engine refuses can be raised
                self._server.started_call = started
                self._server.run(sockets=[self._listener])
                if self._server.failed:
                    raise self._server.failed
            finally:
                self._service.close()

    def stop(self) -> None:
        """Let `run` finish what was taken, and return. Any thread may call it."""
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): choose others by --host and --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """Ends normally on a signal, once what was taken is answered; a second Ctrl-C does not wait for that."""

    started_call: Callable[[], None] | None = None
    failed: Exception | None = None  # what `started_call` raised, as where nobody reads stdout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            if self.started_call:
                self.started_call()
        except Exception as error:  # raised by `run`: within the event loop it would be logged with its trace
            self.failed, self.should_exit = error, True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
