"""Embedding through a server into a store of one's own: `mgn-deploy serve`, and Triton's protocol."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mgn_deploy
from serving import open_service, running

from mgn_deploy.backends.remote import HttpBackend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.export.triton import write_model_repository
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.gallery.store import Store
from mgn_deploy.serve.guard import API_KEY
from mgn_deploy.serve.server import HttpServer


@pytest.fixture(scope="module")
def server(bundle_folder: Path) -> Iterator[HttpServer]:
    with running(open_service(bundle_folder)) as server:
        yield server


@pytest.fixture(scope="module")
def triton(bundle_folder: Path, tmp_path_factory) -> Iterator[str]:
    """Triton's gRPC service, with its own messages, over a repository of ours and ONNX Runtime. Not Triton itself."""
    grpc = pytest.importorskip("grpc", reason="tritonclient[grpc] is not installed: the extra `triton` brings it")
    from google.protobuf import text_format
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    folder = write_model_repository(Bundle.open(bundle_folder), tmp_path_factory.mktemp("models"))
    config = text_format.Parse((folder / "config.pbtxt").read_text(), service_pb2.ModelConfigResponse().config)
    engine = Embedder.open(bundle_folder, "onnxruntime").backend
    turn = threading.Lock()

    class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ServerMetadata(self, request: Any, context: Any) -> Any:
            return service_pb2.ServerMetadataResponse(name="triton", version="2.50.0")

        def ModelConfig(self, request: Any, context: Any) -> Any:
            if request.name == "renamed":
                renamed = service_pb2.ModelConfigResponse(config=config)
                renamed.config.output[0].name = "features"
                return renamed
            if request.name not in ("mgn", "failing"):
                context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
            return service_pb2.ModelConfigResponse(config=config)

        def ModelInfer(self, request: Any, context: Any) -> Any:
            if request.model_name == "failing":
                context.abort(grpc.StatusCode.INTERNAL, "Failed to process the request(s)")
            (given,) = request.inputs
            assert (given.name, given.datatype) == ("images", "UINT8")
            assert given.shape[0] <= config.max_batch_size
            images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(given.shape)
            with turn:
                rows = engine(images)
            answer = service_pb2.ModelInferResponse(model_name="mgn", raw_output_contents=[rows.tobytes()])
            answer.outputs.add(name="embeddings", datatype="FP32", shape=rows.shape)
            return answer

    service = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Triton(), service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    yield f"grpc://127.0.0.1:{port}"
    service.stop(None)


def same_rows(store: Path, other: Path) -> bool:
    one, two = Store.open(store), Store.open(other)
    return one.rows == two.rows and np.allclose(one.embeddings(), two.embeddings(), atol=1e-6)


def test_a_store_made_through_a_server_is_the_one_made_here(
    server: HttpServer, gallery_store: Path, crops: Path, tmp_path: Path, bundle_folder: Path
) -> None:
    done = mgn_deploy(
        "embed", crops, "-o", tmp_path / "s", "--server", server.address, "--labels", "market1501", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["embedded"] == 40
    assert same_rows(tmp_path / "s", gallery_store)
    assert Store.open(tmp_path / "s").manifest == Store.open(gallery_store).manifest.model_copy(
        update={"shards": Store.open(tmp_path / "s").manifest.shards, "bundle_path": None}
    )
    again = mgn_deploy(
        "embed", crops, "-o", tmp_path / "s", "--bundle", bundle_folder, "--backend", "onnxruntime", "--json"
    )
    assert json.loads(again.stdout)["unchanged"] == 40


def test_a_store_made_through_triton_has_the_same_embeddings(
    triton: str, gallery_store: Path, crops: Path, tmp_path: Path
) -> None:
    done = mgn_deploy("embed", crops, "-o", tmp_path / "s", "--server", triton, "--labels", "market1501", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "triton-onnxruntime"
    assert same_rows(tmp_path / "s", gallery_store)


def test_rows_of_triton_and_of_another_engine_never_mix(
    triton: str, gallery_store: Path, crops: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(gallery_store, tmp_path / "s")
    done = mgn_deploy("embed", crops, "-o", store, "--server", triton)
    assert done.exit_code == 2
    assert "triton-onnxruntime" in done.stderr


def test_a_server_of_another_bundle_is_refused(server: HttpServer, triton: str, weights: Path, tmp_path: Path) -> None:
    other = another_bundle(weights, tmp_path)
    for url in (server.address, triton):
        with pytest.raises(UserError, match="their embeddings cannot be compared"):
            Embedder.connect(url, other)


def another_bundle(weights: Path, folder: Path) -> Bundle:
    """The same model without its mirror: another bundle."""
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions

    return export_bundle(weights, folder / "other", ExportOptions(flip=False))


def test_a_server_that_begins_to_serve_another_bundle_is_noticed(server: HttpServer, triton: str) -> None:
    for url in (server.address, triton):
        backend = Embedder.connect(url).backend
        backend.model = backend.model._replace(bundle_id="0" * 64)
        with pytest.raises(UserError, match="another bundle"):
            backend(np.zeros((1, backend.model.height, backend.model.width, 3), np.uint8))


def test_more_crops_than_a_request_takes_go_in_several(bundle_folder: Path, embedder: Embedder) -> None:
    images = np.random.default_rng(0).integers(0, 256, (23, embedder.height, embedder.width, 3), np.uint8)
    with running(open_service(bundle_folder, images=5)) as server:
        assert np.allclose(HttpBackend(server.address)(images), embedder.backend(images), atol=1e-6)
        assert server._service.metrics.requests.labels("/embed", 200)._value.get() == 5


def test_batches_come_back_in_their_order(server: HttpServer, embedder: Embedder) -> None:
    generator = np.random.default_rng(0)
    shape = (embedder.height, embedder.width, 3)
    batches = [generator.integers(0, 256, (count, *shape), np.uint8) for count in (1, 8, 3, 8, 2, 5, 8, 8)]
    for rows, batch in zip(HttpBackend(server.address).stream(batches), batches, strict=True):
        assert np.allclose(rows, embedder.backend(batch), atol=1e-6)


def test_a_full_server_is_asked_again_and_a_server_that_is_away_until_patience_ends(
    bundle_folder: Path, embedder: Embedder
) -> None:
    image = np.zeros((1, embedder.height, embedder.width, 3), np.uint8)
    service = open_service(bundle_folder, images=8, queued=8)
    with running(service) as server:
        backend = HttpBackend(server.address, patience=30)
        with ThreadPoolExecutor(1) as pool:
            with service.queue.reserve(8):
                asked = pool.submit(backend, image)
                time.sleep(0.3)
                assert not asked.done()
            assert asked.result(30).shape == (1, embedder.dim)
    with pytest.raises(UserError, match="does not answer"):
        HttpBackend(server.address)


def test_the_key_is_shown_where_it_is_set(
    bundle_folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, "a key of some characters")
    with running(open_service(bundle_folder)) as server:
        assert HttpBackend(server.address).model.bundle_id == embedder.bundle.id
        monkeypatch.setenv(API_KEY, "another key of some length")
        with pytest.raises(UserError, match=r"401.*API key"):
            HttpBackend(server.address)


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("ftp://host:1", "no server"),
        ("host:8000", "no server"),
        ("http://", "no server"),
        ("http://127.0.0.1:1", "does not answer"),
        ("grpc://127.0.0.1:1", "start Triton there"),
    ],
)
def test_what_is_no_server_is_said_in_one_sentence(url: str, sentence: str) -> None:
    done = mgn_deploy("embed", ".", "-o", "s", "--server", url) if "." in url else None
    with pytest.raises(UserError, match=sentence):
        Embedder.connect(url)
    assert done is None or done.exit_code == 2


def test_a_model_that_triton_does_not_have_is_said(triton: str) -> None:
    with pytest.raises(UserError, match="unknown model: 'other'"):
        Embedder.connect(f"{triton}/other")


def test_a_model_with_other_outputs_and_one_that_fails_are_said(triton: str) -> None:
    with pytest.raises(UserError, match="gives 'features', not 'images' and 'embeddings': write it again"):
        Embedder.connect(f"{triton}/renamed")
    failing = Embedder.connect(f"{triton}/failing")
    with pytest.raises(UserError, match=r"Failed to process the request\(s\): Triton's log says more"):
        failing.embed([np.zeros((failing.height, failing.width, 3), np.uint8)])


def test_a_call_that_is_too_large_for_the_server_says_to_give_a_smaller_batch(triton: str) -> None:
    backend = Embedder.connect(triton).backend
    backend.model = backend.model._replace(batch=1000)
    crops = 4 * 2**20 // (backend.model.height * backend.model.width * 3) + 1  # gRPC's limit unless a server sets it
    with pytest.raises(UserError, match=r"larger than max .*: give a smaller --batch"):
        backend(np.zeros((crops, backend.model.height, backend.model.width, 3), np.uint8))


def test_embed_needs_a_bundle_or_a_server(crops: Path, tmp_path: Path) -> None:
    done = mgn_deploy("embed", crops, "-o", tmp_path / "s")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--bundle, or --server" in done.stderr


def test_a_server_killed_in_the_middle_loses_no_row_that_was_embedded(
    bundle_folder: Path, crops: Path, tmp_path: Path, gallery_store: Path
) -> None:
    service = open_service(bundle_folder)
    with running(service) as server:
        backend = HttpBackend(server.address, patience=0)
        embedder = Embedder(backend, backend.model)

        def stop_in_the_middle(step: str, done: int, total: int) -> None:
            if done >= 4:
                server.stop()
                while server._service.queue._thread.is_alive():
                    time.sleep(0.01)

        with pytest.raises(UserError, match=r"does not answer|refuses|is full"):
            embed_folder(
                crops, tmp_path / "s", embedder, labels="market1501", batch_size=2, progress=stop_in_the_middle
            )
    assert 4 <= len(Store.open(tmp_path / "s")) < 40
    with running(open_service(bundle_folder)) as server:
        embed_folder(crops, tmp_path / "s", Embedder.connect(server.address), labels="market1501")
    assert same_rows(tmp_path / "s", gallery_store)
