"""What a running server refuses, and how it answers many callers at once."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hostile import png_bomb
from serving import files, open_service, running

from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.serve import service as service_module
from mgn_deploy.serve.server import HttpServer
from mgn_deploy.serve.uploads import Crop, Upload, decode


@pytest.fixture(scope="module")
def server(bundle_folder: Path, gallery_store: Path, tmp_path_factory) -> Iterator[HttpServer]:
    people = tmp_path_factory.mktemp("people") / "people"
    with running(open_service(bundle_folder, gallery_store, people)) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    "path, request_, sentence",
    [
        ("/embed", {}, "no image"),
        ("/embed", {"files": [("photo", ("a.jpg", b"x"))]}, "'photo'"),
        ("/embed", {"files": [("image", ("a.jpg", b"x"))], "data": {"colour": "red"}}, "'colour'"),
        ("/embed", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "form"),
        ("/embed", {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "form"),
        ("/embed", {"content": b"x", "headers": {"content-type": "application/x-npy"}}, ".npy"),
        ("/embed?boxes=1", {"content": b"x"}, "boxes"),
        ("/search?k=0", {"content": b"x"}, "k: "),
        ("/search?k=1000", {"content": "PHOTO"}, "k must be"),
        ("/search?camera=north", {"content": b"x"}, "integer"),
        ("/search?far=2", {"content": b"x"}, "far"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(client, photo: Path, path, request_, sentence) -> None:
    if request_.get("content") == "PHOTO":
        request_ = {"content": photo.read_bytes()}
    answer = client.post(path, **request_)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert sentence in answer.json()["error"]


def test_too_many_images_and_too_many_pixels_are_413(client, photo: Path) -> None:
    assert client.post("/embed", files=files(*[photo] * 65)).status_code == 413
    assert client.post("/embed", files=files(*[photo] * 66)).status_code == 413
    boxes = json.dumps([[0, 0, 9, 9]] * 65)
    assert client.post("/embed", files=files(photo), data={"boxes": boxes}).status_code == 413
    assert client.post("/embed", content=png_bomb(9000)).status_code == 413


def test_a_store_that_grows_is_seen(bundle_folder: Path, crops: Path, tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "store"
    shutil.copytree(crops / "camera 1", photos)
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    embed_folder(photos, folder, embedder)
    late = draw_crop(99, 3, 0)
    with running(open_service(bundle_folder, folder)) as server, httpx.Client(base_url=server.address) as client:
        assert client.get("/store").json()["images"] == 20
        late.save(photos / "0099_c3s1_000000_00.png")
        embed_folder(photos, folder, embedder)
        end = time.monotonic() + 30
        while client.get("/store").json()["images"] == 20 and time.monotonic() < end:
            time.sleep(0.1)
        file = ("image", ("a.png", (photos / "0099_c3s1_000000_00.png").read_bytes()))
        answer = client.post("/search", files=[file], params={"k": 1}).json()
        assert answer["crops"][0]["results"][0]["name"] == "0099_c3s1_000000_00.png"


def test_callers_at_once_get_their_own_answers(client, crops: Path, embedder: Embedder) -> None:
    paths = sorted(crops.rglob("*.jpg"))
    wanted = embedder.embed(paths)

    def ask(path: Path) -> list[float]:
        return client.post("/embed", content=path.read_bytes()).json()["crops"][0]["embedding"]

    with ThreadPoolExecutor(16) as pool:
        assert np.allclose(list(pool.map(ask, paths)), wanted, atol=1e-6)


def test_no_more_images_are_decoded_at_once_than_there_are_cpus(
    bundle_folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting, at_once, most = threading.Lock(), 0, 0

    def slowly(*arguments: object) -> list[Crop]:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with counting:
            at_once -= 1
        return decode(*arguments)

    monkeypatch.setattr(service_module, "decode", slowly)
    monkeypatch.setattr(service_module, "usable_cpus", lambda: 2)
    image = Upload("a.jpg", photo.read_bytes())
    with open_service(bundle_folder) as service, ThreadPoolExecutor(8) as callers:
        list(callers.map(service.embed, [[image], [image] * 3] * 8))
    assert most == 2


def test_a_full_queue_says_when_to_come_back(bundle_folder: Path, photo: Path) -> None:
    service = open_service(bundle_folder, batch=2, queued=2, images=2)
    engine, go_on = service.embedder.backend, threading.Event()
    run = engine.stream
    with running(service) as server, httpx.Client(base_url=server.address, timeout=60) as client:
        engine.stream = lambda batches: (go_on.wait(30), run(batches))[1]  # the engine, held up
        try:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(client.post, "/embed", files=files(photo, photo))
                while service.queue.reserved < 2:
                    time.sleep(0.001)
                refused = client.post("/embed", files=files(photo))
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert client.get("/readyz").status_code == 503
                assert client.get("/healthz").status_code == 200
                go_on.set()
                assert waiting.result(30).status_code == 200
        finally:
            go_on.set()


def test_without_a_gallery_or_people_their_questions_are_refused(bundle_folder: Path, photo: Path) -> None:
    with running(open_service(bundle_folder)) as server, httpx.Client(base_url=server.address) as client:
        for path, option in (("/search", "--store"), ("/identify", "--people"), ("/enrol", "--people")):
            answer = client.post(path, files=files(photo))
            assert answer.status_code == 422
            assert option in answer.json()["error"]
        assert client.post("/embed", files=files(photo)).status_code == 200
