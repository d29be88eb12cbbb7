"""The proof passes for right engines and fails for graphs that are wrong as graphs go wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from wrong_graphs import CORRUPTIONS, let_rows_leak, make_nan, make_nan_in_a_batch_of_one, perturb_one_layer

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import FileEntry, Proof, write_manifest
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.export.proof.proof import Pixels, proof_crops, prove


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return proof_crops(crops, 96, 32)


@pytest.fixture(scope="module")
def reference(bundle_folder, pixels) -> np.ndarray:
    import torch

    torch.set_num_threads(1)
    return run_in_batches(ENGINES["torch"].load().open(Bundle.open(bundle_folder)), pixels)


def with_graph(bundle_folder: Path, place: Path, graph: onnx.ModelProto) -> Bundle:
    """A copy of the bundle that holds this graph, and says so."""
    shutil.copytree(bundle_folder, place)
    content = graph.SerializeToString()
    (place / "graph.onnx").write_bytes(content)
    manifest = Bundle.open(bundle_folder).manifest
    files = {
        **manifest.files,
        "graph.onnx": FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
    }
    write_manifest(place, manifest.model_copy(update={"files": files, "proofs": {}}))
    return Bundle.open(place)


def proof_of(bundle: Bundle, backend: str, pixels: np.ndarray, reference: np.ndarray) -> Proof:
    engine = ENGINES[backend].load().open(bundle)
    return prove(engine, Pixels(pixels, "crops", drawn=True), reference, "fp32")


# Right engines


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_right_engine_is_proven(bundle_folder, pixels, reference, backend):
    proof = proof_of(Bundle.open(bundle_folder), backend, pixels, reference)
    assert proof.passed
    assert proof.misses == []
    assert proof.worst_cosine > 0.999999
    assert proof.top10_agreement == 1
    assert 0 < proof.max_abs_error < 1e-5
    assert proof.batch_drift < 1e-5
    assert proof.images == 40
    assert -1 < proof.other_images_cosine < 0.9999
    engine = ENGINES[backend].load().open(Bundle.open(bundle_folder))
    assert proof.backend_version == engine.version


def test_an_unchanged_graph_that_is_written_anew_is_still_right(bundle_folder, tmp_path, pixels, reference):
    """What the corruptions below do, without a corruption."""
    bundle = with_graph(bundle_folder, tmp_path / "b", onnx.load(bundle_folder / "graph.onnx"))
    assert proof_of(bundle, "onnxruntime", pixels, reference).passed


def test_the_figures_are_those_of_a_plain_computation(bundle_folder, tmp_path, pixels, reference):
    graph = onnx.load(bundle_folder / "graph.onnx")
    perturb_one_layer(graph)
    bundle = with_graph(bundle_folder, tmp_path / "b", graph)
    proof = proof_of(bundle, "onnxruntime", pixels, reference)
    found = run_in_batches(ENGINES["onnxruntime"].load().open(bundle), pixels)
    cosines = [
        float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(found, reference, strict=True)
    ]
    others = [float(np.dot(a, b)) for i, a in enumerate(reference) for j, b in enumerate(reference) if i != j]
    assert proof.worst_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert proof.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert proof.max_abs_error == pytest.approx(np.abs(found - reference).max(), abs=1e-7)
    assert proof.other_images_cosine == pytest.approx(np.mean(others), abs=1e-6)


# Wrong engines


@pytest.mark.parametrize("change", CORRUPTIONS, ids=lambda change: change.__name__)
def test_a_wrong_graph_is_not_proven(bundle_folder, tmp_path, pixels, reference, change):
    graph = onnx.load(bundle_folder / "graph.onnx")
    change(graph)
    onnx.checker.check_model(graph, full_check=True)
    proof = proof_of(with_graph(bundle_folder, tmp_path / "b", graph), "onnxruntime", pixels, reference)
    assert not proof.passed
    assert proof.misses


def test_rows_that_leak_are_told_as_what_they_are(bundle_folder, tmp_path, pixels, reference):
    graph = onnx.load(bundle_folder / "graph.onnx")
    let_rows_leak(graph)
    proof = proof_of(with_graph(bundle_folder, tmp_path / "b", graph), "onnxruntime", pixels, reference)
    assert any("with the batch" in miss for miss in proof.misses), proof.misses


class LeaksAt(OnnxRuntimeBackend):
    """An engine whose rows leak in batches of one size alone, as a plan's kernel for its largest batch may."""

    def __init__(self, engine: Backend, size: int) -> None:
        self.version, self.hardware = engine.version, engine.hardware
        self.batch_limits = BatchLimits(1, 8, size)
        self._engine, self._size = engine, size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        found = self._engine(images)
        return np.roll(found, 1, axis=0) if len(images) == self._size else found


@pytest.mark.parametrize("size", [33, 64])
def test_rows_that_leak_in_the_profiles_largest_batch_alone_are_found(bundle_folder, pixels, reference, size):
    engine = LeaksAt(ENGINES["onnxruntime"].load().open(Bundle.open(bundle_folder)), size)
    proof = prove(engine, Pixels(pixels, "crops", drawn=True), reference, "fp32")
    assert any("with the batch" in miss for miss in proof.misses), proof.misses


@pytest.mark.parametrize("change", [make_nan, make_nan_in_a_batch_of_one], ids=lambda change: change.__name__)
def test_embeddings_that_are_not_finite_are_not_proven_and_the_manifest_stays_readable(
    bundle_folder, tmp_path, pixels, reference, change
):
    graph = onnx.load(bundle_folder / "graph.onnx")
    change(graph)
    bundle = with_graph(bundle_folder, tmp_path / "b", graph)
    proof = proof_of(bundle, "onnxruntime", pixels, reference)
    assert not proof.passed
    assert "embeddings are not finite" in proof.misses
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"proofs": {"onnxruntime": proof}}))
    text = (bundle.folder / "manifest.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    json.loads(text)
    assert Bundle.open(bundle.folder).manifest.proofs["onnxruntime"] == proof
