"""What a running server answers, over HTTP."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import files, open_service, running, with_calibration

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery.store import Store
from mgn_deploy.identity.calibration import Calibration
from mgn_deploy.images.decode import read_crop
from mgn_deploy.serve.server import HttpServer


@pytest.fixture(scope="module")
def server(bundle_folder: Path, gallery_store: Path, tmp_path_factory) -> Iterator[HttpServer]:
    people = tmp_path_factory.mktemp("people") / "people"
    with running(open_service(bundle_folder, gallery_store, people)) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=60) as client:
        yield client


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_an_image_as_the_body_is_embedded_as_the_library_does(client, photo: Path, embedder: Embedder) -> None:
    answer = client.post("/embed", content=photo.read_bytes(), headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200
    (crop,) = answer.json()["crops"]
    assert answer.json()["bundle_id"] == embedder.bundle.id
    assert np.allclose(crop["embedding"], embedder.embed([photo])[0], atol=1e-6)


def test_many_images_of_a_form_are_answered_in_their_order(client, crops: Path, embedder: Embedder) -> None:
    paths = sorted(crops.rglob("*.jpg"))[:11]
    answer = client.post("/embed", files=files(*paths)).json()
    assert [crop["image"] for crop in answer["crops"]] == [path.name for path in paths]
    assert np.allclose([crop["embedding"] for crop in answer["crops"]], embedder.embed(paths), atol=1e-6)


def test_each_box_of_an_image_is_embedded(client, photo: Path, embedder: Embedder) -> None:
    boxes = [[0, 0, 30, 60], [9000, 0, 5, 5], [5, 5, 40, 80]]
    answer = client.post("/embed", files=files(photo), data={"boxes": json.dumps(boxes)}).json()
    first, outside, last = answer["crops"]
    image = Image.open(photo)
    wanted = embedder.embed([image.crop((0, 0, 30, 60)), image.crop((5, 5, 45, 85))])
    assert np.allclose([first["embedding"], last["embedding"]], wanted, atol=1e-6)
    assert outside["embedding"] is None
    assert "no 4 pixels" in outside["error"]
    raw = client.post("/embed", params={"boxes": "[[0,0,30,60]]"}, content=photo.read_bytes()).json()
    assert np.allclose(raw["crops"][0]["embedding"], first["embedding"], atol=1e-6)


def test_an_unreadable_image_does_not_cost_the_others_their_answer(client, photo: Path) -> None:
    answer = client.post("/embed", files=[*files(photo), ("image", ("b.jpg", b"no image"))])
    assert answer.status_code == 200
    good, bad = answer.json()["crops"]
    assert (good["error"], bad["embedding"]) == (None, None)
    assert "not an image" in bad["error"]


def test_where_nothing_can_be_read_the_request_is_refused_in_one_sentence(client) -> None:
    answer = client.post("/embed", files=[("image", ("b.jpg", b"no image")), ("image", ("c.jpg", b""))])
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("b.jpg cannot be read: not an image")


def test_decoded_crops_are_answered_as_an_array(client, crops: Path, embedder: Embedder) -> None:
    paths = sorted(crops.rglob("*.jpg"))[:5]
    pixels = np.stack([read_crop(path, embedder.height, embedder.width) for path in paths])
    answer = client.post("/embed", content=npy(pixels), headers={"content-type": "application/x-npy"})
    assert answer.headers["mgn-bundle-id"] == embedder.bundle.id
    assert np.allclose(np.load(io.BytesIO(answer.content)), embedder.embed(paths), atol=1e-6)


def test_search_finds_the_image_itself_first(client, photo: Path) -> None:
    answer = client.post("/search", files=files(photo), params={"k": 7}).json()
    results = answer["crops"][0]["results"]
    assert results[0]["name"] == f"camera 1/{photo.name}"
    assert (results[0]["similarity"], results[0]["identity"]) == (pytest.approx(1, abs=1e-5), 1)
    assert [result["rank"] for result in results] == list(range(1, 8))
    similarities = [result["similarity"] for result in results]
    assert similarities == sorted(similarities, reverse=True)


def test_search_is_the_stores_own_ranking(client, photo: Path, gallery_store: Path, embedder: Embedder) -> None:
    store = Store.open(gallery_store)
    similarities = store.embeddings() @ embedder.embed([photo])[0]
    results = client.post("/search", files=files(photo), params={"k": 40}).json()["crops"][0]["results"]
    assert [result["similarity"] for result in results] == pytest.approx(sorted(similarities, reverse=True), abs=1e-5)
    by_name = dict(zip((row.name for row in store), similarities, strict=True))
    assert all(result["similarity"] == pytest.approx(by_name[result["name"]], abs=1e-5) for result in results)


def test_search_keeps_to_the_cameras_that_were_asked_for(client, photo: Path) -> None:
    def cameras(*wanted: int) -> set[int]:
        answer = client.post("/search", files=files(photo), params={"k": 40, "camera": wanted}).json()
        return {result["camera"] for result in answer["crops"][0]["results"]}

    assert (cameras(2), cameras(1, 2), cameras(), cameras(9)) == ({2}, {1, 2}, {1, 2}, set())


def test_thumbnails_are_small_jpegs_that_a_browser_may_keep(client, photo: Path) -> None:
    result = client.post("/search", files=files(photo), params={"k": 1}).json()["crops"][0]["results"][0]
    answer = client.get(result["thumbnail"])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == Image.open(photo).size
    assert answer.headers["cache-control"] == "private, max-age=3600"
    again = client.get(result["thumbnail"], headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "key", ["x", "Li4vLi4vZXRjL3Bhc3N3ZA", "L2V0Yy9wYXNzd2Q", "%00", "..%2f..%2fetc%2fpasswd", "ä"]
)
def test_thumbnails_of_what_is_not_in_the_gallery_are_not_there(client, key: str) -> None:
    answer = client.get(f"/thumbs/{key}")
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_compare_is_the_cosine_of_two_images(client, crops: Path, embedder: Embedder) -> None:
    paths = sorted(crops.rglob("*.jpg"))[:2]
    a, b = embedder.embed(paths)
    answer = client.post("/compare", files=files(*paths)).json()
    assert answer["similarity"] == pytest.approx(float(a @ b), abs=1e-5)
    assert (answer["probability"], answer["same"]) == (None, None)
    assert client.post("/compare", files=files(paths[0])).status_code == 422
    bad = client.post("/compare", files=[*files(paths[0]), ("image", ("b.jpg", b"x"))])
    assert (bad.status_code, bad.json()["error"][:21]) == (422, "b.jpg cannot be read:")


def test_a_person_is_enrolled_named_and_forgotten(client, crops: Path) -> None:
    first, second = sorted((crops / "camera 1").glob("0003*.jpg"))
    assert client.post("/identify", files=files(first)).json()["answers"] == []
    done = client.post("/enrol", files=files(first, second), data={"name": "Zoë"}).json()
    assert (done["name"], done["images"], done["added"]) == ("Zoë", 2, 2)
    known = client.post("/enrol", files=files(first), data={"name": "Zoë"}).json()
    assert (known["added"], known["notes"]) == (0, ["images that are Zoë's already, or given twice: 1 of 1"])
    again = client.post("/enrol", files=files(first), data={"name": "Zoe"}).json()
    assert again["notes"] == ["images of Zoe that are enrolled as Zoë too: 1; one name is wrong"]
    client.delete("/people", params={"name": "Zoe"})
    assert [person["name"] for person in client.get("/people").json()["people"]] == ["Zoë"]
    (answer,) = client.post("/identify", files=files(first)).json()["answers"]
    assert answer["candidates"][0]["name"] == "Zoë"
    assert answer["known"] is None  # the bundle has no calibration
    together = client.post("/identify", files=files(first, second), params={"together": True}).json()["answers"]
    assert [answer["queries"] for answer in together] == [[first.name, second.name]]
    assert client.request("DELETE", "/people", params={"name": "Zoë"}).status_code == 200
    assert client.get("/people").json()["people"] == []
    assert client.request("DELETE", "/people", params={"name": "Zoë"}).status_code == 422


def test_people_who_cannot_be_written_are_no_fault_of_the_request(client, photo: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = client.post("/enrol", files=files(photo), data={"name": "Anna"})
    assert (answer.status_code, "the disk is full" in answer.json()["error"]) == (507, True)
    monkeypatch.undo()
    assert client.get("/people").json()["people"] == []


def test_a_calibration_gives_probabilities_thresholds_and_names(
    bundle_folder: Path, gallery_store: Path, crops: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("mgn_deploy.serve.gallery.estimate_prior", lambda rows, calibration: 5 / len(rows))
    bundle = with_calibration(bundle_folder, gallery_store, tmp_path / "bundle")
    calibration = Calibration.open(Bundle.open(bundle))
    first, second = sorted((crops / "camera 1").glob("0003*.jpg"))
    service = open_service(bundle, gallery_store, tmp_path / "people")
    with running(service) as server, httpx.Client(base_url=server.address) as client:
        answer = client.post("/search", files=files(first), params={"far": 0.01}).json()
        assert (answer["threshold"], answer["far"]) == calibration.decide(0.01)[1::-1]
        assert answer["prior"] == 0.125 != calibration.prior
        for result in answer["crops"][0]["results"]:
            expected = calibration.probability(result["similarity"], answer["prior"])
            assert result["probability"] == pytest.approx(expected, abs=1e-3)
        assert client.post("/search", files=files(first), params={"after": "nan"}).status_code == 422
        compared = client.post("/compare", files=files(first, first)).json()
        assert (compared["same"], compared["threshold"]) == (True, calibration.decide(1e-3).threshold)
        client.post("/enrol", files=files(first, second), data={"name": "Zoë"})
        (identified,) = client.post("/identify", files=files(first)).json()["answers"]
        assert (identified["name"], identified["known"]) == ("Zoë", True)


def test_nobody_is_enrolled_by_an_image_that_cannot_be_read(client, photo: Path) -> None:
    answer = client.post("/enrol", files=[*files(photo), ("image", ("b", b"x"))], data={"name": "A"})
    assert answer.status_code == 422
    assert client.post("/enrol", files=files(photo), data={"name": "../A"}).status_code == 422
    assert client.post("/enrol", files=files(photo)).status_code == 422
    assert client.get("/people").json()["people"] == []


def test_openapi_describes_the_routes_and_no_page_loads_from_elsewhere(client) -> None:
    description = client.get("/openapi.json").json()
    routes = {"/embed", "/search", "/compare", "/identify", "/enrol", "/people", "/store", "/about", "/thumbs/{key}"}
    assert routes | {"/healthz", "/readyz", "/metrics"} == set(description["paths"])
    body = description["paths"]["/embed"]["post"]["requestBody"]["content"]
    assert set(body) == {"image/*", "multipart/form-data", "application/x-npy"}
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    for path in ("/", "/page.js", "/page.css"):
        assert "://" not in client.get(path).text.replace("http://www.w3.org", "")


def test_metrics_count_requests_and_images(client, photo: Path) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    images, requests = value("mgn_images_total"), value('mgn_requests_total{path="/embed",status="200"}')
    client.post("/embed", files=files(photo, photo, photo))
    assert value("mgn_images_total") == images + 3
    assert value('mgn_requests_total{path="/embed",status="200"}') == requests + 1
    assert value("mgn_gallery_images") == 40
    assert client.get("/nowhere").status_code == 404
    assert value('mgn_requests_total{path="other",status="404"}') >= 1


def test_health_and_facts(client, bundle_folder: Path) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    about = client.get("/about").json()
    assert about["bundle_id"] == Bundle.open(bundle_folder).id
    assert (about["gallery"], about["people"], about["calibrated"]) == (True, True, False)
    store = client.get("/store").json()
    assert (store["images"], store["found"], store["cameras"]) == (40, 40, {"1": 20, "2": 20})
