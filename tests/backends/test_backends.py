"""The engines: they agree, and `auto` takes the fastest that may run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mgn_deploy.backends.opening import compare_with_proof, open_backend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import write_manifest
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.machine import Hardware, this_cpu

HERE = ("openvino", "onnxruntime", "torch")  # what the tests' environment has, in the order of `auto`


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 96, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def opened(bundle_folder):
    import torch

    torch.set_num_threads(1)
    return {name: open_backend(Bundle.open(bundle_folder), name) for name in HERE}


def marked(bundle_folder: Path, place: Path, **passed: bool) -> Bundle:
    """A copy of the bundle that has a proof of these backends only, passed or not."""
    shutil.copytree(bundle_folder, place)
    bundle = Bundle.open(place)
    proofs = {
        name: bundle.manifest.proofs[name].model_copy(
            update={"passed": fine, "misses": [] if fine else ["worst cosine 0.5"]}
        )
        for name, fine in passed.items()
    }
    write_manifest(place, bundle.manifest.model_copy(update={"proofs": proofs}))
    return Bundle.open(place)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("batch", [1, 8, 9])
def test_backends_agree(opened, pixels, name, batch):
    expected = opened["torch"](pixels)[:batch]
    found = opened[name](pixels[:batch])
    assert found.dtype == np.float32
    assert found.shape == (batch, 128)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("name", HERE)
def test_a_result_is_not_overwritten_by_the_next_call(opened, pixels, name):
    first = opened[name](pixels[:3])
    kept = first.copy()
    opened[name](pixels[3:6])
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("name", HERE)
def test_the_input_is_left_as_it_was(opened, pixels, name):
    before = pixels.copy()
    opened[name](pixels)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("name", HERE)
def test_a_backend_names_itself_its_version_and_its_device(opened, name):
    assert (opened[name].name, opened[name].version) == (name, __import__(name).__version__)
    assert opened[name].device


def test_onnxruntime_is_the_cpus_whatever_build_is_installed(opened):
    assert opened["onnxruntime"].device == "CPU"
    assert opened["onnxruntime"]._session.get_providers() == ["CPUExecutionProvider"]


def test_openvino_computes_in_float32(opened):
    """Left alone it runs float32 graphs in bfloat16 on CPUs that have it."""
    assert (
        opened["openvino"]._request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    )


def test_auto_is_the_first_of_the_order(bundle_folder):
    assert open_backend(Bundle.open(bundle_folder)).name == HERE[0]


def test_auto_passes_over_what_is_not_proven(bundle_folder, tmp_path):
    bundle = marked(bundle_folder, tmp_path / "b", openvino=False, onnxruntime=True, torch=True)
    assert open_backend(bundle).name == "onnxruntime"
    assert open_backend(bundle, allow_unproven=True).name == "openvino"


HARDWARE = this_cpu()
A10 = HARDWARE.model_copy(update={"gpu": "NVIDIA A10", "compute_capability": "8.6", "driver": "580.65.06"})


class Opened(NamedTuple):
    """What is compared of an engine that was compiled for its GPU: none can be opened without one."""

    name: str
    version: str
    hardware: Hardware
    fused_heads: bool
    compiled: bool = True


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"backend_version": "1999.1"}, "proven with onnxruntime 1999.1"),
        ({"hardware": HARDWARE.model_copy(update={"cpu": "another CPU"})}, "on another CPU (x86_64: "),
        # The name alone does not tell: INT8 sums differ between AVX2 and VNNI.
        ({"hardware": HARDWARE.model_copy(update={"instruction_sets": ("avx2",)})}, "(x86_64: avx2) and this is "),
    ],
)
def test_an_engine_that_was_proven_elsewhere_is_warned_of(bundle_folder, tmp_path, caplog, change, told):
    bundle = Bundle.open(bundle_folder)
    open_backend(bundle, "onnxruntime")
    assert not caplog.text
    proofs = {"onnxruntime": bundle.manifest.proofs["onnxruntime"].model_copy(update=change)}
    moved = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"proofs": proofs}))
    assert open_backend(moved, "onnxruntime").name == "onnxruntime"
    assert told in caplog.text
    assert "`mgn-deploy prove" in caplog.text


@pytest.mark.parametrize(
    ("version", "gpu", "fused_heads", "same"),
    [
        ("10.9", A10, False, True),
        ("10.8", A10, False, False),
        ("10.9", HARDWARE.model_copy(update={"gpu": "NVIDIA A100", "compute_capability": "8.0"}), False, False),
        ("10.9", A10, True, False),
    ],
)
def test_an_engine_compiled_for_another_gpu_or_release_than_the_proven_one_is_refused(
    bundle_folder, version, gpu, fused_heads, same
):
    bundle = Bundle.open(bundle_folder)
    proof = bundle.manifest.proofs["onnxruntime"].model_copy(update={"backend_version": "10.9", "hardware": A10})
    proven = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"proofs": {"tensorrt": proof}}))
    engine = Opened("tensorrt", version, gpu, fused_heads)
    if same:
        compare_with_proof(proven, engine)
    else:
        with pytest.raises(CannotRun, match=rf"this is tensorrt {version}.* on {gpu.gpu} .*: `mgn-deploy prove"):
            compare_with_proof(proven, engine)


def test_another_driver_is_warned_of(bundle_folder, caplog):
    bundle = Bundle.open(bundle_folder)
    facts = {"backend_version": "10.9", "hardware": A10}
    proofs = {"tensorrt": bundle.manifest.proofs["onnxruntime"].model_copy(update=facts)}
    proven = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"proofs": proofs}))
    compare_with_proof(proven, Opened("tensorrt", "10.9", A10.model_copy(update={"driver": "999.1"}), False))
    assert (
        "driver 580.65.06) and this is tensorrt 10.9 on NVIDIA A10 (compute capability 8.6, driver 999.1)"
        in caplog.text
    )


def test_auto_passes_over_what_was_never_tried(bundle_folder, tmp_path):
    assert open_backend(marked(bundle_folder, tmp_path / "b", onnxruntime=True)).name == "onnxruntime"


def test_where_nothing_is_proven_every_backends_reason_is_told(bundle_folder, tmp_path):
    bundle = marked(bundle_folder, tmp_path / "b", openvino=False)
    with pytest.raises(
        UserError,
        match=r"no backend can run .*openvino: .*worst cosine 0\.5.*onnxruntime: .* no proof.*torch: .* no",
    ):
        open_backend(bundle)


@pytest.mark.parametrize("passed", [{"onnxruntime": False}, {"openvino": True}])
def test_a_named_backend_without_proof_is_refused_unless_allowed(bundle_folder, tmp_path, passed):
    bundle = marked(bundle_folder, tmp_path / "b", **passed)
    with pytest.raises(UserError, match=r"(is not proven|no proof) for onnxruntime.*--allow-unproven"):
        open_backend(bundle, "onnxruntime")
    assert open_backend(bundle, "onnxruntime", allow_unproven=True).name == "onnxruntime"


def test_an_unknown_backend_is_a_sentence_with_the_known(bundle_folder):
    with pytest.raises(
        UserError,
        match="no backend 'tensorflow': choose auto, tensorrt, tensorrt-rtx, torch-cuda, onnxruntime-cuda, openvino, "
        "onnxruntime, torch",
    ):
        open_backend(Bundle.open(bundle_folder), "tensorflow")


def test_the_torch_backend_of_a_bundle_without_weights_is_a_sentence(bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    files = {name: entry for name, entry in bundle.manifest.files.items() if name == "graph.onnx"}
    write_manifest(tmp_path / "b", bundle.manifest.model_copy(update={"files": files}))
    with pytest.raises(UserError, match="--no-reference"):
        open_backend(Bundle.open(tmp_path / "b"), "torch")


@pytest.mark.parametrize("name", HERE)
def test_a_changed_file_reaches_no_engine(bundle_folder, tmp_path, name):
    shutil.copytree(bundle_folder, tmp_path / "b")
    path = tmp_path / "b" / ("reference.safetensors" if name == "torch" else "graph.onnx")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name} is not what was exported"):
        open_backend(Bundle.open(tmp_path / "b"), name)


@pytest.mark.parametrize("name", HERE)
def test_what_is_installed_is_not_missing(name):
    assert ENGINES[name].load().missing() is None
