"""Object stores and web servers, by fsspec's file system in memory and a web server of this process."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import remote
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.inputs import open_inputs, open_source
from mgn_deploy.gallery.store import Store

NAMES = ["a.jpg", "b.jpg", "cam 2/c.jpg"]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    draw_crop(number, 1, 0).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three drawn crops and a text, in a folder."""
    for number, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (tmp_path / "photos/notes.txt").write_text("x")
    return tmp_path / "photos"


@pytest.fixture
def bucket(folder) -> Iterator[fsspec.AbstractFileSystem]:
    """The same in memory://bucket/photos."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        system.pipe(f"/bucket/photos/{path.relative_to(folder)}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; the first `fails` requests for b.jpg end with 503."""

    fails = 0

    def do_GET(self) -> None:
        if self.path.endswith("b.jpg") and type(self).fails > 0:
            type(self).fails -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(folder, monkeypatch) -> Iterator[str]:
    """The folder on a web server; yields its URL."""
    monkeypatch.setattr(Handler, "fails", 0)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder.parent)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/photos"
        running.shutdown()


def names(source) -> list[str]:
    return [file.name for file in source.files]


def assert_rows_of_the_folder(store: Path, folder: Path, tmp_path: Path, embedder) -> None:
    embed_folder(folder, tmp_path / "local", embedder)
    local, opened = Store.open(tmp_path / "local"), Store.open(store)
    assert [(row.size, row.sha256) for row in opened] == [(row.size, row.sha256) for row in local]
    assert np.array_equal(opened.embeddings(), local.embeddings())


def test_a_bucket_has_the_rows_of_the_folder(bucket, folder, tmp_path, embedder):
    report = embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder)
    assert [row.name for row in Store.open(tmp_path / "s")] == NAMES
    assert Store.open(tmp_path / "s").manifest.source == "memory://bucket/photos"
    assert report.skipped == {".txt": 1}
    assert_rows_of_the_folder(tmp_path / "s", folder, tmp_path, embedder)


def test_a_second_run_embeds_what_is_new_or_has_changed(bucket, tmp_path, embedder):
    embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder)
    assert embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder).unchanged == 3
    bucket.pipe("/bucket/photos/d.jpg", jpeg(5))
    bucket.pipe("/bucket/photos/a.jpg", jpeg(6))
    report = embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder)
    assert (report.embedded, report.unchanged) == (2, 2)


def test_changed_bytes_of_the_same_size_and_time_are_found_by_verify_content(bucket, tmp_path, embedder):
    embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder)
    content = bucket.store["/bucket/photos/b.jpg"].getbuffer()
    content[-40] ^= 1
    del content
    assert embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder).embedded == 0
    report = embed_folder(open_source("memory://bucket/photos"), tmp_path / "s", embedder, verify_content=True)
    assert (report.embedded, report.unchanged) == (1, 2)


def test_single_objects_and_patterns_are_named_below_their_folder_or_the_root(bucket):
    assert names(open_source("memory://bucket/photos/a.jpg")) == ["a.jpg"]
    assert names(open_source("memory://bucket/photos/*.jpg")) == ["a.jpg", "b.jpg"]
    assert names(open_source("memory://bucket/photos/?.jpg")) == ["a.jpg", "b.jpg"]
    assert names(open_source("memory://bucket/photos/**/*.jpg")) == NAMES
    both = open_source("memory://bucket/photos/a.jpg", "memory://bucket/photos/cam 2", "memory://bucket/photos/a.jpg")
    assert names(both) == ["a.jpg", "cam 2/c.jpg"]
    assert names(open_source("memory://bucket/photos/*.jpg", root="memory://bucket")) == [
        "photos/a.jpg",
        "photos/b.jpg",
    ]
    with pytest.raises(UserError, match="is not below 'memory://other'"):
        open_source("memory://bucket/photos/*.jpg", root="memory://other")


def test_an_object_that_is_gone_when_it_is_read_is_a_row(bucket, tmp_path, embedder):
    source = open_source("memory://bucket/photos")
    bucket.rm("/bucket/photos/b.jpg")
    bucket.pipe("/bucket/photos/a.jpg", b"no image")
    report = embed_folder(source, tmp_path / "s", embedder)
    assert dict(report.failed)["b.jpg"] == "no such object"
    assert "not an image" in dict(report.failed)["a.jpg"]
    assert report.embedded == 1


def test_boxes_in_remote_photos(bucket, tmp_path, embedder):
    (tmp_path / "b.csv").write_text("path,left,top,width,height\na.jpg,2,2,30,60\na.jpg,5,2,30,60\nb.jpg,2,2,30,60\n")
    reads = []
    source = open_inputs(["memory://bucket/photos"], boxes=tmp_path / "b.csv")
    cat, type(bucket).cat_file = type(bucket).cat_file, lambda *given, **more: reads.append(1) or cat(*given, **more)
    try:
        assert embed_folder(source, tmp_path / "s", embedder).embedded == 3
    finally:
        type(bucket).cat_file = cat
    assert [row.name for row in Store.open(tmp_path / "s")] == ["a.jpg#1", "a.jpg#2", "b.jpg#1"]
    assert len(reads) == 2


def test_a_web_server_has_the_rows_of_the_folder(server, folder, tmp_path, embedder):
    assert names(open_source(server + "/")) == names(open_source(server))
    embed_folder(open_source(server), tmp_path / "s", embedder)
    opened = Store.open(tmp_path / "s")
    assert [row.name for row in opened] == ["a.jpg", "b.jpg", "cam%202/c.jpg"]
    assert opened.rows[0].mtime_ns == int((folder / "a.jpg").stat().st_mtime) * 10**9
    assert_rows_of_the_folder(tmp_path / "s", folder, tmp_path, embedder)
    assert embed_folder(open_source(server + "/"), tmp_path / "s", embedder).unchanged == 3


def test_a_request_that_fails_is_tried_again(server, tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(Handler, "fails", 2)
    report = embed_folder(open_source(f"{server}/a.jpg", f"{server}/b.jpg"), tmp_path / "s", embedder)
    assert (report.embedded, report.failed) == (2, [])
    monkeypatch.setattr(Handler, "fails", 100)
    report = embed_folder(open_source(f"{server}/a.jpg", f"{server}/b.jpg"), tmp_path / "t", embedder)
    assert report.embedded == 1
    [(name, reason)] = report.failed
    assert name == "b.jpg"
    assert "not read in 3 tries" in reason
    assert "503" in reason


def test_of_several_urls_of_a_web_server_a_missing_one_is_a_row(server, tmp_path, embedder):
    source = open_source(f"{server}/a.jpg", f"{server}/none.jpg", f"{server}/none.tar")
    assert embed_folder(source, tmp_path / "s", embedder).failed == [
        ("none.jpg", "no such object"),
        ("none.tar", "no such object"),
    ]
    with pytest.raises(UserError, match=r"none\.jpg' cannot be listed: no such object"):
        open_source(f"{server}/none.jpg")


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("memory://bucket/none", "cannot be listed: no such object"),
        ("memory://bucket/photos/*.gif", "holds no image"),
        ("http://127.0.0.1:9/photos/", "cannot be listed: .*Cannot connect to host 127.0.0.1:9"),
        ("http://127.0.0.1:9/a.jpg", "cannot be listed: .*Cannot connect to host 127.0.0.1:9"),
        ("ftp://host/a.jpg", "ftp:// is not read: give s3://"),
        ("s3://[bucket/a.jpg", r"'s3://\[bucket/a.jpg' is no URL: Invalid IPv6 URL"),
        ("s3://bucket/%00", "'s3://bucket/%00' is no URL: it has a NUL character"),
        ("https://user:word@host/a.jpg", "'host/a.jpg': a URL with a password or a query would be kept"),
        ("https://host/a.jpg?token=word", "'https://host/a.jpg': a URL with a password or a query would be kept"),
        ("s3://bucket/a.jpg", "fsspec reads s3:// with s3fs, which is not installed .pip install s3fs."),
        ("gs://bucket/a.jpg", "fsspec reads gs:// with gcsfs, which is not installed"),
    ],
)
def test_urls_that_cannot_be_read_are_a_sentence(bucket, monkeypatch, url, sentence):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=sentence) as refused:
        open_source(url)
    assert "word" not in str(refused.value).replace("password", "")


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"pip install 'mgn-deploy\[remote\]'|fsspec is installed and cannot"):
        open_source("memory://bucket/photos")


def test_urls_beside_paths_or_of_two_servers_are_a_sentence(bucket, folder):
    with pytest.raises(UserError, match="beside paths of this machine"):
        open_source("memory://bucket/photos", folder)
    with pytest.raises(UserError, match=r"--root memory://bucket is a URL, and .* is of this machine"):
        open_source(folder, root="memory://bucket")
    with pytest.raises(UserError, match="differ in their scheme"):
        open_source("memory://bucket/photos", "s3://bucket/photos")


def test_embed_takes_urls_on_the_command_line(server, tmp_path, bundle_folder):
    options = ["-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime"]
    done = mgn_deploy("embed", f"{server}/a.jpg", f"{server}/cam%202/c.jpg", *options)
    assert done.exit_code == 0, done.output
    assert "2 embedded" in done.stdout
