"""The proof passes for right engines and fails for graphs that are wrong as graphs go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import mgn_deploy
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import FileEntry, Proof, Quantisation, Ranking, write_manifest
from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.precision.calibration_images import read_calibration_images
from mgn_deploy.export.proof.agreement import TIE, run_in_batches, top_agreement
from mgn_deploy.export.proof.proof import FEWEST_IMAGES, MOST_IMAGES, Pixels, proof_crops, prove, with_ranking
from mgn_deploy.export.proof.prove import allowed_map, proof_pixels
from mgn_deploy.retrieval.validate import validate

Change = Callable[[onnx.ModelProto], None]


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


def initializer(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [one for one in graph.graph.initializer if one.name == name]
    return found


def set_values(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(values, numpy_helper.to_array(tensor).dtype), tensor.name)
    )


# Ways in which an exporter can be wrong, each as a change of the right graph.


def swap_red_and_blue(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    for node in graph.graph.node:
        node.input[:] = ["swapped" if name == "images" else name for name in node.input]
    graph.graph.node.insert(0, helper.make_node("Gather", ["images", "bgr"], ["swapped"], axis=3))


def drop_the_mirror(graph: onnx.ModelProto) -> None:
    """The second half of the batch is the images once more, not their mirrors."""
    (flip,) = [node for node in graph.graph.node if node.op_type == "Slice" and not node.name.startswith("heads/")]
    for node in graph.graph.node:
        node.input[:] = [flip.input[0] if name == flip.output[0] else name for name in node.input]
    graph.graph.node.remove(flip)


def move_the_heads_by_one(graph: onnx.ModelProto) -> None:
    for name in ("heads.weight", "heads.bias"):
        tensor = initializer(graph, name)
        set_values(tensor, np.roll(numpy_helper.to_array(tensor), 1, axis=0))


def swap_the_halves_of_the_embedding(graph: onnx.ModelProto) -> None:
    order = np.concatenate([np.arange(64, 128), np.arange(64)])
    graph.graph.initializer.append(numpy_helper.from_array(order, "order"))
    graph.graph.node[-1].output[0] = "unordered"
    graph.graph.node.append(helper.make_node("Gather", ["unordered", "order"], ["embeddings"], axis=1))


def perturb_one_layer(graph: onnx.ModelProto) -> None:
    (tensor,) = [one for one in graph.graph.initializer if one.name.endswith("branches.2.layer4.1.conv2.weight")]
    values = numpy_helper.to_array(tensor)
    set_values(tensor, values + 0.05 * values.std() * np.random.default_rng(0).normal(size=values.shape))


def shift_the_mean_by_two_grey_levels(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, next(one.name for one in graph.graph.initializer if one.name.endswith("mean")))
    set_values(tensor, numpy_helper.to_array(tensor) + 2)


def let_rows_leak(graph: onnx.ModelProto) -> None:
    """A hundredth of the batch's mean in every row: right for a batch of one."""
    norm = next(node for node in graph.graph.node if node.op_type == "ReduceL2")
    features = norm.input[0]
    for node in graph.graph.node:
        node.input[:] = [
            "leaking" if name == features and node.op_type in ("ReduceL2", "Div") else name for name in node.input
        ]
    at = list(graph.graph.node).index(norm)
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0]), "batch_axis"),
            numpy_helper.from_array(np.array(0.01, np.float32), "share"),
        ]
    )
    for node in reversed(
        [
            helper.make_node("ReduceMean", [features, "batch_axis"], ["mean_row"], keepdims=1),
            helper.make_node("Mul", ["mean_row", "share"], ["leak"]),
            helper.make_node("Add", [features, "leak"], ["leaking"]),
        ]
    ):
        graph.graph.node.insert(at, node)


def make_nan(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, "heads.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[3, 0, 5] = np.nan
    set_values(tensor, values)


def make_nan_in_a_batch_of_one(graph: onnx.ModelProto) -> None:
    """Divides by the batch's size less one, as an unbiased variance over the batch would."""
    output = graph.graph.node[-1]
    output.output[0] = "whole"
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
        ]
    )
    graph.graph.node.extend(
        [
            helper.make_node("Shape", ["whole"], ["batch_size"], start=0, end=1),
            helper.make_node("Cast", ["batch_size"], ["batch_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Sub", ["batch_float", "one"], ["others"]),
            helper.make_node("Div", ["zero", "others"], ["nothing"]),
            helper.make_node("Add", ["whole", "nothing"], ["embeddings"]),
        ]
    )


CORRUPTIONS = [
    swap_red_and_blue,
    drop_the_mirror,
    move_the_heads_by_one,
    swap_the_halves_of_the_embedding,
    perturb_one_layer,
    shift_the_mean_by_two_grey_levels,
    let_rows_leak,
]


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


# Rankings


@pytest.mark.parametrize(
    ("precision", "measured", "allowed", "missed"),
    [
        ("fp32", (0.5, 0.4), 0, []),
        ("fp32", (0.6, 0.6), 0, []),  # better is no loss
        ("fp16", (0.5, 0.3997), 0, []),
        ("fp16", (0.5, 0.3995), 0, ["mAP"]),
        ("fp16", (0.495, 0.4), 0, []),  # one query of 200
        ("fp16", (0.49, 0.4), 0, ["rank-1"]),
        ("int8", (0.495, 0.3961), 0, []),
        ("int8", (0.48, 0.39), 0, ["mAP", "rank-1"]),
        ("int8", (0.48, 0.39), 0.02, []),
    ],
)
def test_a_ranking_keeps_its_share_of_the_references(bundle_folder, precision, measured, allowed, missed):
    proof = Bundle.open(bundle_folder).manifest.proofs["onnxruntime"]
    rank1, mean_ap = measured
    ranking = Ranking(
        data="d", queries=200, gallery=7, rank1=rank1, mAP=mean_ap, reference_rank1=0.5, reference_mAP=0.4
    )
    ranked = with_ranking(proof, ranking, precision, allowed)
    assert [miss.split()[0] for miss in ranked.misses] == missed
    assert ranked.passed == (not missed)
    assert ranked.ranking == ranking


def test_a_budget_of_neighbours_allows_no_loss_of_map():
    budget = {"engine": "openvino", "method": "max", "errors": {}, "images": 1, "image_source": "", "images_sha256": ""}
    of_neighbours = Quantisation(**budget, max_drop=20, drop=1, drop_of="top-10 agreement")
    assert allowed_map(of_neighbours) == 0
    assert allowed_map(of_neighbours.model_copy(update={"drop_of": "mAP"})) == 0.2
    assert allowed_map(None) == 0


@pytest.mark.slow
def test_export_ranks_labelled_people_with_every_engine_beside_the_reference(weights, tmp_path):
    draw_market1501(tmp_path / "people", train_identities=1, test_identities=6)
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--data", f"market1501:{tmp_path / 'people'}")
    assert done.exit_code == 0, done.stderr
    assert "12 queries" in done.stdout
    rankings = {name: proof.ranking for name, proof in Bundle.open(tmp_path / "b").manifest.proofs.items()}
    assert set(rankings) == {"openvino", "onnxruntime", "torch"}
    data = open_data(f"market1501:{tmp_path / 'people'}")
    expected = validate(data, Embedder.open(tmp_path / "b", "torch"), None).measured
    for ranking in rankings.values():
        assert (ranking.data, ranking.queries, ranking.gallery) == ("market1501", 12, len(data.gallery))
        assert (ranking.reference_rank1, ranking.reference_mAP) == (expected.rank[1], expected.mAP)
        assert ranking.mAP == pytest.approx(expected.mAP, abs=1e-4)


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


@pytest.mark.slow
def test_a_wrong_export_exits_1_is_marked_and_is_not_run_unless_allowed(
    weights, bundle_folder, crops, tmp_path, monkeypatch
):
    """The whole way with an exporter that is wrong: it takes BGR for RGB."""
    wrong = onnx.load(bundle_folder / "graph.onnx")
    swap_red_and_blue(wrong)
    monkeypatch.setattr("mgn_deploy.export.precision.convert.build_graph", lambda model, flip: wrong)
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--proof-images", crops, "--json")
    assert done.exit_code == 1
    assert "is not proven for openvino (worst cosine" in done.stderr
    expected = {"openvino": False, "onnxruntime": False, "torch": True}
    assert {name: proof["passed"] for name, proof in json.loads(done.stdout)["proofs"].items()} == expected
    assert {name: proof.passed for name, proof in Bundle.open(tmp_path / "b").manifest.proofs.items()} == expected
    assert Embedder.open(tmp_path / "b").backend.name == "torch"

    embed = ("embed", crops, "-o", tmp_path / "store", "--bundle", tmp_path / "b", "--backend", "onnxruntime")
    refused = mgn_deploy(*embed)
    assert refused.exit_code == 2
    assert "is not proven for onnxruntime (worst cosine" in refused.stderr
    assert not (tmp_path / "store").exists()
    allowed = mgn_deploy(*embed, "--allow-unproven", "--json")
    assert allowed.exit_code == 0, allowed.stderr
    assert json.loads(allowed.stdout)["embedded"] == 40


def test_a_backend_that_fails_while_it_is_proven_costs_only_its_own_proof(weights, tmp_path, monkeypatch, said):
    def full(bundle, *, fused_heads):
        raise UserError("the GPU has too little free memory")

    monkeypatch.setattr(ENGINES["openvino"].load(), "open", full)
    bundle = export_bundle(weights, tmp_path / "b")
    assert set(bundle.manifest.proofs) == {"onnxruntime", "torch"}
    assert "no proof for openvino: the GPU has too little free memory" in said


def test_where_every_engine_fails_the_sentence_says_why(weights, tmp_path, monkeypatch):
    def full(bundle, *, fused_heads):
        raise UserError("the memory is full")

    for name in ("openvino", "onnxruntime"):
        monkeypatch.setattr(ENGINES[name].load(), "open", full)
    with pytest.raises(UserError, match=r"openvino: the memory is full \| onnxruntime: the memory is full"):
        export_bundle(weights, tmp_path / "b")


# Neighbours


def plain_agreement(embeddings: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Row by row: which of the k nearest are at least as near, by the reference, as its own k-th nearest."""
    shares = []
    for row in range(len(reference)):
        others = [other for other in range(len(reference)) if other != row]
        k = min(k, len(others))
        nearest = sorted(others, key=lambda other: -float(embeddings[row] @ embeddings[other]))[:k]
        similarities = {other: float(reference[row] @ reference[other]) for other in others}
        kth = sorted(similarities.values(), reverse=True)[k - 1]
        shares.append(sum(similarities[other] >= kth - TIE for other in nearest) / k)
    return float(np.mean(shares))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 1))
def test_top_agreement_is_a_plain_loops(n, k, seed, noise):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(n, 6))
    embeddings = reference + noise * rng.normal(size=(n, 6))
    assert top_agreement(embeddings, reference, k) == pytest.approx(
        plain_agreement(embeddings, reference, k), abs=1e-12
    )


def test_neighbours_that_tie_are_equally_right():
    reference = np.array([[1.0, 0], [0, 1], [0, 1], [0, 1]])
    other_order = reference + np.array([[0, 0], [3e-7, 0], [2e-7, 0], [1e-7, 0]])
    assert top_agreement(other_order, reference, 1) == 1


def test_neighbours_that_are_all_wrong_are_no_agreement():
    reference = np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1], [0, 0.1, 1]])
    assert top_agreement(reference[[0, 2, 1, 3]], reference, 1) == 0


# What it is proven on


def test_too_few_images_are_refused(crops, tmp_path):
    for path in sorted(crops.rglob("*.jpg"))[: FEWEST_IMAGES - 1]:
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=r"has 11 readable images: a proof needs at least 12"):
        proof_crops(tmp_path, 96, 32)


def test_unreadable_images_count_for_nothing_and_are_counted(crops, tmp_path, said):
    for path in sorted(crops.rglob("*.jpg"))[:FEWEST_IMAGES]:
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert proof_crops(tmp_path, 96, 32).shape == (12, 96, 32, 3)
    assert f"1 of the 13 images of {tmp_path} to prove on cannot be read" in said


def test_of_many_images_it_takes_some_from_everywhere(crops, tmp_path):
    source = next(crops.rglob("*.jpg"))
    for number in range(2 * MOST_IMAGES + 10):
        os.link(source, tmp_path / f"{number:04d}.jpg")
    assert len(proof_crops(tmp_path, 32, 16)) == (2 * MOST_IMAGES + 10 + 2) // 3


def test_a_folder_whose_name_is_not_utf8_is_named_as_json_can_hold_it(crops, tmp_path):
    folder = shutil.copytree(crops, tmp_path / os.fsdecode(b"caf\xe9"))
    pixels = proof_pixels(folder, 96, 32)
    assert pixels.source == "caf\\xe9"
    assert read_calibration_images(folder, 96, 32, pixels.crops).source == "caf\\xe9"


def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        proof_crops(tmp_path / "nowhere", 96, 32)
