"""Who may ask, and how large and how slow a request may be."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serving import open_service, running

from mgn_deploy.errors import UserError
from mgn_deploy.serve.guard import API_KEY, check_binding, check_key
from mgn_deploy.serve.server import HttpServer

KEY = "a key of some characters"
BODY = 100_000  # bytes, the limit here


@pytest.fixture(scope="module")
def server(bundle_folder: Path) -> Iterator[HttpServer]:
    """Impatient, so that the tests need not wait long."""
    service = open_service(bundle_folder, body_bytes=BODY, header_seconds=0.5, body_seconds=0.5, connections=8)
    with running(service) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def locked(bundle_folder: Path, gallery_store: Path) -> Iterator[HttpServer]:
    patch = pytest.MonkeyPatch()
    patch.setenv(API_KEY, KEY)
    with running(open_service(bundle_folder, gallery_store)) as server:
        patch.undo()
        yield server


def connect(server: HttpServer) -> socket.socket:
    address = urlsplit(server.address)
    return socket.create_connection((address.hostname, address.port), 30)


def answer_of(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    content = b""
    try:
        while part := connection.recv(1 << 16):
            content += part
    except ConnectionResetError:
        pass
    return content


def drip(connection: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection.sendall(b"x")
        time.sleep(0.05)


def test_every_answer_has_the_safe_headers_and_no_cookie(client) -> None:
    for path in ("/", "/healthz", "/nowhere", "/openapi.json"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "cache-control" in headers
        assert {"set-cookie", "server"}.isdisjoint(headers)
    assert client.get("/healthz").headers["cache-control"] == "no-store"


def test_without_the_key_only_the_page_and_its_health_are_answered(locked: HttpServer) -> None:
    with httpx.Client(base_url=locked.address) as client:
        for path in ("/", "/page.js", "/page.css", "/icon.svg", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        for path in ("/about", "/store", "/metrics", "/openapi.json", "/thumbs/x", "/nowhere"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert client.post("/embed", content=b"x").status_code == 401


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"x-api-key": KEY[:-1]}, 401),
        ({"x-api-key": "ä".encode("latin-1")}, 401),
    ],
)
def test_the_key_is_a_bearers_or_a_header_of_its_own(locked: HttpServer, headers: dict, status: int) -> None:
    assert httpx.get(f"{locked.address}/about", headers=headers).status_code == status


def test_another_sites_page_gets_nothing_from_it(client) -> None:
    assert client.get("/about", headers={"origin": "https://elsewhere.example"}).status_code == 403
    assert client.get("/about", headers={"origin": "null"}).status_code == 403
    assert client.post("/embed", content=b"x", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/about", headers={"host": "elsewhere.example"}).status_code == 421  # DNS rebinding
    host = client.base_url.netloc.decode()
    assert (
        client.get("/about", headers={"origin": f"http://{host}", "sec-fetch-site": "same-origin"}).status_code == 200
    )
    assert client.get("/about", headers={"host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_no_other_machine_is_served_without_a_key(host: str) -> None:
    with pytest.raises(UserError, match=API_KEY):
        check_binding(host, None, insecure=False)
    check_binding(host, KEY, insecure=False)
    check_binding(host, None, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_is_served_without_a_key(host: str) -> None:
    check_binding(host, None, insecure=False)


@pytest.mark.parametrize("key", ["short", " with a space at an end", "with a\nnewline in it", "mit Umläuten darin"])
def test_a_key_that_cannot_be_one_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=API_KEY):
        check_key(key)


def test_an_address_in_use_is_said_in_one_sentence(bundle_folder: Path, server: HttpServer) -> None:
    port = urlsplit(server.address).port
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port}"):
        HttpServer(open_service(bundle_folder), port=port)


def test_a_body_over_the_limit_is_413_whether_it_says_so_or_not(client) -> None:
    assert client.post("/embed", content=b"x" * BODY).status_code == 422
    assert client.post("/embed", content=b"x" * (BODY + 1)).status_code == 413
    assert client.post("/embed", content=(b"x" * 1000 for _ in range(BODY // 1000 + 1))).status_code == 413


def test_a_client_that_asks_first_need_not_send_a_body_over_the_limit(server: HttpServer) -> None:
    with connect(server) as connection:
        connection.sendall(
            b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999999\r\nexpect: 100-continue\r\n\r\n"
        )
        assert answer_of(connection).startswith(b"HTTP/1.1 413 ")


def test_an_endless_body_is_cut_off(server: HttpServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        with pytest.raises(OSError):
            connection.sendall(chunk * 10_000)


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: "],
    ids=["nothing", "first line", "headers"],
)
def test_headers_that_do_not_arrive_end_the_connection(server: HttpServer, beginning: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(beginning)
        start = time.monotonic()
        assert answer_of(connection) == b""
        assert 0.3 < time.monotonic() - start < 10


def test_headers_that_drip_end_the_connection(server: HttpServer) -> None:
    with connect(server) as connection, pytest.raises(OSError):
        drip(connection, seconds=20)


def test_a_second_requests_headers_have_a_limit_too(server: HttpServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        first = b""
        while not first.endswith(b'{"status":"alive"}'):
            first += connection.recv(1 << 16)
        connection.sendall(b"GET /healthz")
        start = time.monotonic()
        assert answer_of(connection) == b""
        assert time.monotonic() - start < 10


def test_a_body_that_drips_is_408(server: HttpServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n")
        with ThreadPoolExecutor(1) as pool:
            dripping = pool.submit(drip, connection, seconds=20)
            assert answer_of(connection).startswith(b"HTTP/1.1 408 ")
            assert isinstance(dripping.exception(), OSError)


def test_a_client_that_reads_nothing_is_dropped(bundle_folder: Path, crops: Path) -> None:
    photo = next(crops.rglob("*.jpg")).read_bytes()
    boxes = "[" + ",".join(["[0,0,9,9]"] * 64) + "]"
    with running(open_service(bundle_folder, write_seconds=0.5)) as server, connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /embed?boxes={boxes} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(photo)}\r\n\r\n"
        for _ in range(12):  # of 2 MB each, which no socket's buffers hold
            connection.sendall(head.encode() + photo)
        end = time.monotonic() + 30
        while server._server.server_state.connections and time.monotonic() < end:
            time.sleep(0.05)
        assert not server._server.server_state.connections


def test_connections_over_the_limit_are_told_to_come_back(server: HttpServer, client) -> None:
    held = [connect(server) for _ in range(8)]
    try:
        with connect(server) as one_more:
            assert answer_of(one_more).startswith(b"HTTP/1.1 503 ")
    finally:
        for connection in held:
            connection.close()
    end = time.monotonic() + 10
    while client.get("/healthz").status_code != 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert client.get("/healthz").status_code == 200


def test_uploads_over_all_that_is_held_at_once_are_told_to_come_back(bundle_folder: Path) -> None:
    service = open_service(bundle_folder, body_bytes=BODY, held_bytes=BODY + 1000)
    head = f"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: {BODY}\r\n\r\n".encode()
    with running(service) as server, connect(server) as slow:
        slow.sendall(head + b"x" * (BODY - 1))
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with httpx.Client(base_url=server.address) as client:
                answer = client.post("/embed", content=b"x" * 5000)
            if answer.status_code == 503:  # once the slow one's bytes have arrived
                break
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        slow.sendall(b"x")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 422 ")
        with httpx.Client(base_url=server.address) as client:
            assert client.post("/embed", content=b"x" * 5000).status_code == 422
