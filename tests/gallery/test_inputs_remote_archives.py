"""Tar shards in object stores and on web servers, by fsspec's file system in memory and a server of this process."""

from __future__ import annotations

import io
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery import remote
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.sources import open_source
from mgn_deploy.gallery.store import Store
from mgn_deploy.images.decode import load_rgb

ROWS = ["x-0.tar/a.jpg", "x-0.tar/b.jpg", "x-1.tar/a.jpg", "x-1.tar/b.jpg"]


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two archives of two drawn crops and a text each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"x-{number}.tar", "w") as archive:
            for key in ("a.jpg", "b.jpg", "b.cls"):
                content = io.BytesIO()
                if key.endswith(".jpg"):
                    draw_crop(2 * number + (key == "b.jpg"), 1, 0).save(content, "JPEG")
                member = tarfile.TarInfo(key)
                member.size = len(content.getvalue())
                archive.addfile(member, io.BytesIO(content.getvalue()))
    return folder


@pytest.fixture
def bucket(shards) -> Iterator[fsspec.AbstractFileSystem]:
    """The same in memory://tars."""
    system = fsspec.filesystem("memory")
    for path in shards.iterdir():
        system.pipe(f"/tars/{path.name}", path.read_bytes())
    yield system
    system.rm("/tars", recursive=True)


class Ranges(SimpleHTTPRequestHandler):
    """Serves a folder, and parts of files; the first `fails` requests of a part end with 503."""

    fails = 0
    asked: ClassVar[list[str]] = []

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not span:
            super().do_GET()
        elif type(self).fails > 0:
            type(self).fails -= 1
            self.send_error(503)
        else:
            self.asked.append(self.path)
            content = Path(self.translate_path(self.path)).read_bytes()
            part = content[int(span[1]) : int(span[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Whole(Ranges):
    """Serves whole files alone."""

    def end_headers(self) -> None:
        SimpleHTTPRequestHandler.end_headers(self)

    do_GET = SimpleHTTPRequestHandler.do_GET


@pytest.fixture
def serve(shards, monkeypatch) -> Iterator:
    """A function that serves the archives by a handler's class and gives the server's URL."""
    monkeypatch.setattr(Ranges, "asked", [])
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    servers = []

    def start(handler: type[Ranges]) -> str:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=shards)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_as_on_this_machine(store: Path, shards: Path, tmp_path: Path, embedder) -> None:
    embed_folder(open_source(shards / "x-{1..0}.tar"), tmp_path / "local", embedder)
    local, opened = Store.open(tmp_path / "local"), Store.open(store)
    assert [(row.name, row.size, row.mtime_ns, row.sha256) for row in opened] == [
        (row.name, row.size, row.mtime_ns, row.sha256) for row in local
    ]
    assert [row.name for row in opened] == ROWS
    assert np.array_equal(opened.embeddings(), local.embeddings())


@pytest.mark.parametrize("url", ["memory://tars/x-{0..1}.tar", "memory://tars/*.tar"])
def test_archives_in_a_bucket_have_the_rows_of_archives_here(bucket, shards, tmp_path, embedder, url):
    report = embed_folder(open_source(url), tmp_path / "s", embedder)
    assert (report.embedded, report.skipped) == (4, {".cls": 2})
    assert_as_on_this_machine(tmp_path / "s", shards, tmp_path, embedder)
    assert embed_folder(open_source(url), tmp_path / "s", embedder).unchanged == 4


def test_archives_on_a_web_server_are_read_by_ranges_of_many_members(serve, shards, tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(Ranges, "fails", 2)
    url = serve(Ranges)
    embed_folder(open_source(f"{url}/x-{{0..1}}.tar"), tmp_path / "s", embedder)
    assert_as_on_this_machine(tmp_path / "s", shards, tmp_path, embedder)
    assert sorted(Ranges.asked) == ["/x-0.tar", "/x-1.tar"]  # once for headers and members


def test_a_missing_archive_a_cut_one_and_what_is_none_are_rows(bucket, tmp_path, embedder):
    content = bucket.cat_file("/tars/x-1.tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.getmember("b.jpg")
    bucket.pipe("/tars/x-1.tar", content[: member.offset_data + 100])
    bucket.pipe("/tars/x-2.tar", b"no archive" * 100)
    report = embed_folder(open_source("memory://tars/x-{0..3}.tar"), tmp_path / "s", embedder)
    assert report.embedded == 3
    assert dict(report.failed) == {
        "x-1.tar/b.jpg": "the archive ends within it",
        "x-2.tar": "not a tar archive",
        "x-3.tar": "no such object",
    }


def test_an_archive_that_was_replaced_is_read_anew(bucket, tmp_path, embedder):
    embed_folder(open_source("memory://tars/x-{0..1}.tar"), tmp_path / "s", embedder)
    bucket.pipe("/tars/x-0.tar", bucket.cat_file("/tars/x-1.tar"))
    embed_folder(open_source("memory://tars/x-{0..1}.tar"), tmp_path / "s", embedder, verify_content=True)
    by_name = {row.name: row.sha256 for row in Store.open(tmp_path / "s")}
    assert by_name["x-0.tar/a.jpg"] == by_name["x-1.tar/a.jpg"]


def test_a_server_without_ranges_is_a_sentence(serve, tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1024)
    with pytest.raises(GateFailed, match=r"x-0.tar.*no parts of a file .Range."):
        embed_folder(open_source(f"{serve(Whole)}/x-0.tar"), tmp_path / "s", embedder)


def test_a_compressed_archive_is_a_sentence(bucket):
    bucket.pipe("/tars/y.tar", b"\x1f\x8b" + bytes(100))
    with pytest.raises(UserError, match=r"tars/y.tar is compressed by gzip"):
        open_source("memory://tars/y.tar")


def test_a_row_of_a_bucket_has_its_picture(bucket, tmp_path, embedder):
    bucket.pipe("/tars/deep/c.png", png := picture())
    embed_folder(open_source("memory://tars/x-0.tar", "memory://tars/deep"), tmp_path / "s", embedder)
    store = Store.open(tmp_path / "s")
    images = {row.name: np.asarray(store.image(row)) for row in store}
    assert np.array_equal(images["deep/c.png"], np.asarray(load_rgb(png)))
    with tarfile.open(fileobj=io.BytesIO(bucket.cat_file("/tars/x-0.tar"))) as archive:
        member = archive.extractfile("b.jpg")
        assert member
        assert np.array_equal(images["x-0.tar/b.jpg"], np.asarray(load_rgb(member.read())))
    bucket.pipe("/tars/x-0.tar", bucket.cat_file("/tars/x-1.tar")[:1024])
    with pytest.raises(UserError, match="cannot be read: no such member of the archive"):
        store.image(store.rows[list(images).index("x-0.tar/b.jpg")])


def test_numbers_in_braces_stand_for_names_but_not_for_millions(tmp_path):
    with pytest.raises(UserError, match="stands for more than 100,000 names"):
        open_source(f"{tmp_path}/x-{{0..999999}}.tar")
    with pytest.raises(UserError, match=r"x-08.tar' does not exist"):
        open_source(f"{tmp_path}/x-{{08..11}}.tar")


def picture() -> bytes:
    content = io.BytesIO()
    draw_crop(7, 1, 0).save(content, "PNG")
    return content.getvalue()
