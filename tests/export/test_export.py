"""Weights to bundle, through the library and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import logged, mgn_deploy
from safetensors.torch import load_file, save_file

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import Ranking, write_manifest
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.proof.proof import with_ranking
from mgn_deploy.export.proof.prove import prove_again
from mgn_deploy.files import sha256_file
from mgn_deploy.train.weights import TENSORS, load_weights, weights_hash

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


@pytest.fixture(scope="module")
def other_export(weights, crops, tmp_path_factory) -> tuple[Path, list[str]]:
    """Without mirror average and reference weights, proven on files; and what was said."""
    folder = tmp_path_factory.mktemp("other") / "b"
    with logged() as said:
        export_bundle(weights, folder, ExportOptions(flip=False, reference=False, proof_images=crops))
    return folder, said


@pytest.fixture
def traced(bundle_folder, monkeypatch) -> None:
    """Tracing takes seconds and is not what these tests are about: take the graph that was traced already."""
    graph = onnx.load(bundle_folder / "graph.onnx")
    monkeypatch.setattr("mgn_deploy.export.precision.convert.build_graph", lambda model, flip: graph)


def test_a_bundle_is_graph_weights_and_manifest(bundle_folder, weights):
    assert sorted(path.name for path in bundle_folder.iterdir()) == [
        "graph.onnx",
        "manifest.json",
        "manifest.sha256",
        "proof.npz",
        "reference.safetensors",
    ]
    manifest = Bundle.open(bundle_folder).manifest
    for name, entry in manifest.files.items():
        assert (entry.sha256, entry.size) == (
            sha256_file(bundle_folder / name),
            (bundle_folder / name).stat().st_size,
        )
    assert sha256_file(bundle_folder / "reference.safetensors") == sha256_file(weights / TENSORS)
    assert manifest.source_weights_sha256 == weights_hash(weights)
    assert manifest.model == load_weights(weights).config


def test_every_engine_that_is_installed_is_proven_on_drawn_people(bundle_folder):
    proofs = Bundle.open(bundle_folder).manifest.proofs
    assert set(proofs) == {"openvino", "onnxruntime", "torch"}
    for proof in proofs.values():
        assert (proof.passed, proof.drawn, proof.image_source, proof.images) == (
            True,
            True,
            "drawn people",
            96,
        )


def test_a_proof_on_files_names_their_folder_and_is_not_called_drawn(other_export, crops):
    for proof in Bundle.open(other_export[0]).manifest.proofs.values():
        assert (proof.passed, proof.drawn, proof.image_source, proof.images) == (True, False, crops.name, 40)


def test_without_reference_the_weights_stay_at_home_and_the_proofs_are_made(other_export):
    folder, _ = other_export
    assert sorted(path.name for path in folder.iterdir()) == [
        "graph.onnx",
        "manifest.json",
        "manifest.sha256",
        "proof.npz",
    ]
    bundle = Bundle.open(folder)
    assert set(bundle.manifest.files) == {"graph.onnx", "proof.npz"}
    assert bundle.manifest.proofs["onnxruntime"].passed
    with pytest.raises(UserError, match="--no-reference"):
        Embedder.open(bundle, "torch")


def test_the_mirror_average_is_part_of_what_a_bundle_is(other_export, bundle_folder):
    first, other = Bundle.open(bundle_folder), Bundle.open(other_export[0])
    assert (first.manifest.flip, other.manifest.flip) == (True, False)
    assert first.id != other.id
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 32, 3), np.uint8)
    with_mirror, without = (Embedder.open(bundle, "onnxruntime").embed(pixels) for bundle in (first, other))
    assert np.abs(with_mirror - without).max() > 1e-3


def test_export_says_what_it_does(other_export):
    said = "\n".join(other_export[1])
    for word in ("reading", "tracing", "proving openvino", "proving onnxruntime", "40 images"):
        assert word in said


def test_exporting_over_an_earlier_bundle_replaces_it(traced, weights, bundle_folder, crops, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    (tmp_path / "b" / "graph.onnx").write_bytes(b"old")
    export_bundle(weights, tmp_path / "b", ExportOptions(proof_images=crops))
    assert Bundle.open(tmp_path / "b").id == Bundle.open(bundle_folder).id
    assert Bundle.open(tmp_path / "b").read("graph.onnx") == (bundle_folder / "graph.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_exporting_over_something_else_is_refused(weights, crops, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="choose another path"):
        export_bundle(weights, tmp_path, ExportOptions(proof_images=crops))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_exporting_over_an_embedding_store_is_refused(weights, crops, embedder, tmp_path):
    """A store has a manifest.json too."""
    from mgn_deploy.gallery.embed import embed_folder
    from mgn_deploy.gallery.store import Store

    embed_folder(crops, tmp_path / "store", embedder)
    with pytest.raises(UserError, match="choose another path"):
        export_bundle(weights, tmp_path / "store", ExportOptions(proof_images=crops))
    assert len(Store.open(tmp_path / "store")) == 40


def test_weights_that_are_not_finite_are_refused_and_leave_no_bundle(traced, weights, crops, tmp_path):
    shutil.copytree(weights, tmp_path / "w")
    tensors = load_file(tmp_path / "w" / TENSORS)
    tensors["branches.1.reductions.0.1.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "w" / TENSORS)
    with pytest.raises(UserError, match="not finite"):
        export_bundle(tmp_path / "w", tmp_path / "b", ExportOptions(proof_images=crops))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_proof_folder_with_too_few_images_is_refused_before_any_work(weights, crops, tmp_path, said):
    (tmp_path / "few").mkdir()
    shutil.copy(next(crops.rglob("*.jpg")), tmp_path / "few")
    with pytest.raises(UserError, match="at least 12"):
        export_bundle(weights, tmp_path / "b", ExportOptions(proof_images=tmp_path / "few"))
    assert not (tmp_path / "b").exists()
    assert not any("tracing" in sentence for sentence in said)


def test_the_command_prints_its_proofs_and_names_the_folder_it_stands_in(traced, weights, crops, tmp_path, monkeypatch):
    monkeypatch.chdir(crops)
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--proof-images", ".", "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    bundle = Bundle.open(tmp_path / "b")
    assert printed["id"] == bundle.id
    assert printed["proofs"] == {name: proof.model_dump(mode="json") for name, proof in bundle.manifest.proofs.items()}
    assert {proof["image_source"] for proof in printed["proofs"].values()} == {crops.name}


def test_the_command_refuses_what_is_no_weights_folder(tmp_path):
    done = mgn_deploy("export", tmp_path, "-o", tmp_path / "b")
    assert done.exit_code == 2
    assert "is not a weights folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_proven_again_elsewhere_and_stays_the_same_bundle(bundle_folder, crops, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    before = Bundle.open(tmp_path / "b")
    kept = before.manifest.proofs["onnxruntime"].model_copy(update={"backend_version": "of another machine"})
    write_manifest(before.folder, before.manifest.model_copy(update={"proofs": {"tensorrt": kept}}))
    with pytest.raises(CannotRun, match="no proof for onnxruntime"):
        Embedder.open(tmp_path / "b", "onnxruntime")
    done = mgn_deploy("prove", "--bundle", tmp_path / "b", "--proof-images", crops, "--json")
    assert done.exit_code == 0, done.stderr
    after = Bundle.open(tmp_path / "b")
    assert after.id == before.id
    assert set(after.manifest.proofs) == {"tensorrt", "openvino", "onnxruntime", "torch"}
    assert after.manifest.proofs["tensorrt"] == kept
    assert after.manifest.proofs["onnxruntime"].image_source == crops.name
    Embedder.open(tmp_path / "b", "onnxruntime")


def test_proving_again_without_labelled_people_keeps_the_ranking_and_what_it_misses(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    before = Bundle.open(tmp_path / "b")
    lost = Ranking(data="d", queries=50, gallery=99, rank1=0.1, mAP=0.1, reference_rank1=0.9, reference_mAP=0.9)
    failed = with_ranking(before.manifest.proofs["onnxruntime"], lost, "fp32")
    write_manifest(before.folder, before.manifest.model_copy(update={"proofs": {"onnxruntime": failed}}))
    made = prove_again(tmp_path / "b")
    assert (made["onnxruntime"].passed, made["onnxruntime"].misses) == (False, failed.misses)
    assert made["openvino"].passed
    with pytest.raises(CannotRun, match=r"mAP 10\.00 keeps less"):
        Embedder.open(tmp_path / "b", "onnxruntime")


def test_a_bundle_without_its_weights_is_proven_only_on_recorded_images(weights, crops, tmp_path):
    export_bundle(weights, tmp_path / "b", ExportOptions(reference=False))
    assert mgn_deploy("prove", "--bundle", tmp_path / "b").exit_code == 0
    done = mgn_deploy("prove", "--bundle", tmp_path / "b", "--proof-images", crops)
    assert done.exit_code == 2
    assert "was exported with --no-reference" in done.stderr


def test_tensorrt_rtx_plans_are_built_ahead_of_time_into_the_bundle(weights, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("export", weights, "-o", tmp_path / "b", "--engine", "tensorrt-rtx", "--precision", "fp16")
    arguments += ("--compute-capability", "8.6,12.0", "--batch", "1,4,16")
    done = mgn_deploy(*arguments)
    assert done.exit_code == 0, done.stderr
    bundle = Bundle.open(tmp_path / "b")
    assert [(plan.compute_capability, plan.batch) for plan in bundle.manifest.engines] == [
        ("8.6", (1, 4, 16)),
        ("12.0", (1, 4, 16)),
    ]
    for plan in bundle.manifest.engines:
        assert len(bundle.read(plan.file)) > 100_000
        assert "Datatype: Half" in bundle.read(plan.file.replace(".plan", ".layers.txt")).decode()
    without_plans = export_bundle(weights, tmp_path / "c", ExportOptions(precision="fp16"))
    assert without_plans.id == bundle.id
    assert "tensorrt-rtx" not in bundle.manifest.proofs or bundle.manifest.proofs["tensorrt-rtx"].passed
    again = mgn_deploy(*arguments)  # over the earlier bundle, plans from the cache
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("from the cache") == 2
    changed = tmp_path / "b" / bundle.manifest.engines[0].file
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"\.plan is not what was exported"):
        bundle.read(changed.name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--engine", "tensorrt-rtx", "--batch", "4,1"), "--batch 4,1"),
        (("--engine", "tensorrt-rtx", "--compute-capability", "5.0"), "not for '5.0'"),
        (
            ("--engine", "tensorrt-rtx", "--hardware-compatible"),
            "--hardware-compatible is about TensorRT plans: it goes with --engine tensorrt",
        ),
        (
            ("--engine", "tensorrt", "--compute-capability", "8.6"),
            "--compute-capability is about TensorRT plans: it goes with --engine tensorrt-rtx",
        ),
        (("--engine", "tflite"), "'tflite' is not one of"),
        (("--engine", "tensorrt-rtx", "--workspace", "inf"), "--workspace inf: GiB are above 0"),
        (("--engine", "tensorrt-rtx", "--workspace", "0"), "--workspace 0.0: GiB are above 0"),
        (("--batch", "1,8,16"), "--batch is about TensorRT plans"),
        (("--engine", "openvino", "--no-cache"), "--no-cache is about TensorRT plans"),
        (("--version-compatible",), "--version-compatible is about TensorRT plans"),
    ],
)
def test_plans_that_cannot_be_are_one_sentence(weights, tmp_path, traced, arguments, sentence):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "tracing" not in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"engine": "tflite"}, "--engine tflite: choose tensorrt, tensorrt-rtx, openvino, onnxruntime"),
        ({"precision": "int4"}, "--precision int4: choose fp32, fp16, bf16, int8"),
    ],
)
def test_a_python_caller_gets_the_closed_choices_refused_too(choice, sentence):
    with pytest.raises(UserError) as refused:
        ExportOptions(**choice)
    assert str(refused.value) == sentence


def test_a_triton_model_repository_is_written_beside_the_bundle(weights, tmp_path, traced):
    done = mgn_deploy("export", weights, "-o", tmp_path / "b", "--triton", tmp_path / "models", "--batch", "1,4,16")
    assert done.exit_code == 0, done.stderr
    config = (tmp_path / "models" / "mgn" / "config.pbtxt").read_text()
    assert "max_batch_size: 16" in config
    assert "preferred_batch_size: [ 4, 16 ]" in config
    assert (tmp_path / "models" / "mgn" / "1" / "model.onnx").is_file()
