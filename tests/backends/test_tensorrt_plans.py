"""Which plan of a bundle TensorRT runs, and what is said where none fits."""

from __future__ import annotations

from pathlib import Path

import pytest
from plans import rtx, with_plan
from pydantic import ValidationError

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.plans import fitting_entry, misfit, plan_for
from mgn_deploy.bundle.manifest import EngineEntry
from mgn_deploy.cuda.device import Gpu
from mgn_deploy.errors import CannotRun, UserError

ADA = Gpu("NVIDIA GeForce RTX 4090", "8.9")


needs_builder = pytest.mark.skipif(
    bool(ENGINES["tensorrt-rtx"].import_problem()), reason="tensorrt-rtx-cu13 is not installed"
)


def trt(**changes) -> EngineEntry:
    return rtx(**{"engine": "tensorrt", "version": "10.9.0", "gpu": ADA.name, **changes})


@pytest.mark.parametrize(
    ("entry", "version", "gpu"),
    [
        (rtx(), "1.7.1", ADA),
        (rtx(compute_capability=None), "1.7.1", Gpu("NVIDIA GeForce RTX 5090", "12.0")),
        (rtx(compute_capability=None), "1.7.1", Gpu("NVIDIA A100", "8.0")),
        (trt(), "10.9.0", ADA),
        (trt(hardware_compatible=True), "10.9.0", Gpu("NVIDIA GeForce RTX 5090", "12.0")),
        (trt(version_compatible=True), "10.13.2", ADA),
        (trt(version_compatible=True), "11.0.0", ADA),
    ],
)
def test_a_plan_fits_what_it_was_built_for(entry, version, gpu) -> None:
    assert misfit(entry, version, gpu, fused_heads=False) is None


@pytest.mark.parametrize(
    ("entry", "version", "gpu", "reason"),
    [
        (rtx(), "1.8.0", ADA, "built by TensorRT-RTX 1.7.1 and 1.8.0 is installed"),
        (rtx(), "1.7.1", Gpu("RTX 3090", "8.6"), "needs compute capability 8.9 and RTX 3090 has 8.6"),
        (
            rtx(compute_capability=None),
            "1.7.1",
            Gpu("T4", "7.5"),
            "needs compute capability 8.0 or later and T4 has 7.5",
        ),
        (trt(), "10.9.0", Gpu("NVIDIA L4", "8.9"), "built for NVIDIA GeForce RTX 4090 and this is NVIDIA L4"),
        (trt(version_compatible=True), "10.8.0", ADA, "built by TensorRT 10.9.0 and 10.8.0 is installed"),
        (trt(hardware_compatible=True), "10.9.0", Gpu("T4", "7.5"), "8.0 or later"),
    ],
)
def test_a_plan_for_something_else_says_what_it_is_for(entry, version, gpu, reason) -> None:
    assert reason in misfit(entry, version, gpu, fused_heads=False)


@pytest.mark.parametrize("built", [True, False])
def test_a_plan_with_other_heads_does_not_fit(built: bool) -> None:
    reason = misfit(rtx(fused_heads=built), "1.7.1", ADA, fused_heads=not built)
    assert reason == f"a.plan was built {'with' if built else 'without'} fused heads"


def test_a_plan_of_the_other_engine_is_not_taken(bundle_folder: Path, tmp_path: Path) -> None:
    if not ENGINES["tensorrt"].import_problem():
        pytest.skip("tensorrt is installed here")
    with pytest.raises(CannotRun, match="it has no plan for TensorRT"):
        plan_for(with_plan(bundle_folder, tmp_path, rtx()), "tensorrt", "1.7.1", ADA, False)


def test_a_plan_for_this_very_gpu_goes_before_one_for_many() -> None:
    many, own = rtx(file="many.plan", compute_capability=None), rtx(file="own.plan")
    assert fitting_entry([many, own], "1.7.1", ADA, False) == own
    assert fitting_entry([many], "1.7.1", ADA, False) == many
    assert fitting_entry([own], "1.7.2", ADA, False) is None


@pytest.mark.parametrize("file", ["../a.plan", "a.onnx", "", "a/b.plan", ".plan"])
def test_a_manifest_names_no_plan_outside_the_bundle(file: str) -> None:
    with pytest.raises(ValidationError):
        rtx(file=file)


def test_the_bundles_plan_is_read_where_it_fits(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = with_plan(bundle_folder, tmp_path, trt())
    assert plan_for(bundle, "tensorrt", "10.9.0", ADA, False) == b"a plan"


def test_a_plan_with_a_flipped_byte_reaches_no_runtime(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = with_plan(bundle_folder, tmp_path, trt())
    (tmp_path / "a.plan").write_bytes(b"a plaN")
    with pytest.raises(UserError, match=r"a\.plan is not what was exported \(its SHA-256 differs\)"):
        plan_for(bundle, "tensorrt", "10.9.0", ADA, False)


@needs_builder
def test_a_plan_of_another_version_is_built_anew_with_its_profile_and_kept(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import tensorrt_rtx as package

    from mgn_deploy.files import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = with_plan(bundle_folder, tmp_path, rtx(version="1.0.0"))
    built = plan_for(bundle, "tensorrt-rtx", package.__version__, ADA, False)
    assert built != b"a plan"
    assert "was built by TensorRT-RTX 1.0.0" in caplog.text
    assert f"building a plan for {ADA.name}, once" in caplog.text
    assert len(list(cache_folder("plans").glob("*.plan"))) == 1
    assert plan_for(bundle, "tensorrt-rtx", package.__version__, ADA, False) == built


def test_where_nothing_can_be_built_the_sentence_says_what_the_plan_is_for_and_what_to_do(
    bundle_folder: Path, tmp_path: Path
) -> None:
    if not ENGINES["tensorrt"].import_problem():
        pytest.skip("tensorrt is installed here")
    bundle = with_plan(bundle_folder, tmp_path, trt())
    with pytest.raises(CannotRun) as caught:
        plan_for(bundle, "tensorrt", "10.9.0", Gpu("NVIDIA L4", "8.9"), False)
    sentence = str(caught.value)
    assert "a.plan was built for NVIDIA GeForce RTX 4090 and this is NVIDIA L4" in sentence
    assert "none can be built from its graph (tensorrt is not installed" in sentence
    assert "--engine tensorrt, or choose another --backend" in sentence
