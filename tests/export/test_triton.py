"""Triton model repositories, parsed with Triton's own schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import EngineEntry
from mgn_deploy.errors import UserError

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")

from google.protobuf import text_format  # noqa: E402

from mgn_deploy.export.options import ExportOptions  # noqa: E402
from mgn_deploy.export.triton import write_model_repository  # noqa: E402


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder)


def config_of(folder: Path):
    """Fields that the schema does not have are an error here."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


def entry(**changes) -> EngineEntry:
    facts = {
        "file": "a.plan",
        "engine": "tensorrt",
        "version": "10.9.0",
        "compute_capability": "8.6",
        "gpu": "NVIDIA A10",
    }
    return EngineEntry(**{**facts, "batch": (1, 8, 64), **changes})


def with_plan(bundle: Bundle, tmp_path: Path, content: bytes, plan: EngineEntry) -> Bundle:
    """The bundle with one more file; what Triton would load is not looked at here."""
    import hashlib

    from mgn_deploy.bundle.manifest import FileEntry

    (tmp_path / plan.file).write_bytes(content)
    file = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    proofs = {"tensorrt": bundle.manifest.proofs["onnxruntime"]}
    manifest = bundle.manifest.model_copy(
        update={"files": {**bundle.manifest.files, plan.file: file}, "proofs": proofs}
    )
    return dataclasses.replace(bundle, folder=tmp_path, manifest=manifest)


def test_the_configuration_is_valid_in_tritons_schema_and_has_no_batch_dimension(
    bundle: Bundle, tmp_path: Path
) -> None:
    config = config_of(write_model_repository(bundle, tmp_path / "models"))
    assert config.parameters["bundle_id"].string_value == bundle.id
    assert [(one.name, list(one.dims), one.data_type) for one in config.input] == [
        ("images", [96, 32, 3], schema.TYPE_UINT8)
    ]
    assert [(one.name, list(one.dims), one.data_type) for one in config.output] == [
        ("embeddings", [bundle.config.dim], schema.TYPE_FP32)
    ]
    assert (config.name, config.backend, config.max_batch_size) == ("mgn", "onnxruntime", 64)


def test_requests_are_batched_on_one_instance(bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(write_model_repository(bundle, tmp_path, max_batch=16, preferred=(16, 4)))
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, schema.ModelInstanceGroup.KIND_AUTO)]


def test_every_batch_size_that_triton_aims_at_is_warmed_up_with_random_pixels(bundle: Bundle, tmp_path: Path) -> None:
    config = config_of(write_model_repository(bundle, tmp_path, max_batch=32, preferred=(8,)))
    assert [one.batch_size for one in config.model_warmup] == [1, 8, 32]
    assert all(list(one.inputs["images"].dims) == [96, 32, 3] for one in config.model_warmup)
    assert all(one.inputs["images"].random_data for one in config.model_warmup)


def test_the_graph_has_no_local_functions_and_the_same_input_and_output(bundle: Bundle, tmp_path: Path) -> None:
    graph = onnx.load(write_model_repository(bundle, tmp_path) / "1" / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert not graph.functions
    assert [value.name for value in (*graph.graph.input, *graph.graph.output)] == ["images", "embeddings"]


def test_a_plan_is_served_by_the_tensorrt_backend_on_gpus(bundle: Bundle, tmp_path: Path) -> None:
    plan = entry()
    folder = write_model_repository(with_plan(bundle, tmp_path, b"plan", plan), tmp_path / "models", plan=plan)
    config = config_of(folder)
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"


def test_a_plan_whose_bytes_changed_is_not_served(bundle: Bundle, tmp_path: Path) -> None:
    plan = entry()
    changed = with_plan(bundle, tmp_path, b"plan", plan)
    (tmp_path / plan.file).write_bytes(b"plon")
    with pytest.raises(UserError, match="SHA-256"):
        write_model_repository(changed, tmp_path / "models", plan=plan)
    assert not (tmp_path / "models" / "mgn").exists()


def test_a_second_writing_replaces_the_model_and_leaves_others(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_model_repository(bundle, tmp_path, max_batch=8, preferred=(8,))
    write_model_repository(bundle, tmp_path, max_batch=16, preferred=(8,))
    assert config_of(tmp_path / "mgn").max_batch_size == 16
    assert (tmp_path / "other").is_dir()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_batch": 4, "preferred": (8,)}, "between 1 and the maximum, 4"),
        ({"preferred": ()}, "none: each must lie"),
        ({"plan": entry(engine="tensorrt-rtx", gpu=None)}, "Triton runs no plan of TensorRT-RTX"),
        ({"plan": entry(batch=(1, 8, 32))}, "build it with --batch 1,8,64"),
        ({"plan": entry(batch=(8, 8, 64))}, "build it with --batch 1,8,64"),
    ],
)
def test_what_triton_cannot_serve_is_refused(bundle: Bundle, tmp_path: Path, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        write_model_repository(bundle, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_what_is_not_proven_with_the_engine_that_triton_runs_is_not_served(bundle: Bundle, tmp_path: Path) -> None:
    plan = entry()
    with_a_plan = with_plan(bundle, tmp_path, b"plan", plan)
    failed = bundle.manifest.proofs["onnxruntime"].model_copy(update={"passed": False})
    for proofs in ({"openvino": bundle.manifest.proofs["openvino"]}, {"onnxruntime": failed}):
        unproven = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"proofs": proofs}))
        with pytest.raises(UserError, match="by onnxruntime, which is not proven with it"):
            write_model_repository(unproven, tmp_path / "models")
    manifest = with_a_plan.manifest.model_copy(update={"proofs": bundle.manifest.proofs})
    with pytest.raises(UserError, match=r"run a\.plan of .* by tensorrt, which is not proven"):
        write_model_repository(dataclasses.replace(with_a_plan, manifest=manifest), tmp_path / "models", plan=plan)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({"precision": "fp32"}, True),
        ({"precision": "fp16", "engine": "tensorrt-rtx"}, True),
        ({"precision": "int8", "engine": "onnxruntime", "calib": "images"}, True),
        ({"precision": "bf16", "engine": "tensorrt"}, True),
        ({"precision": "bf16"}, False),
        ({"precision": "int8", "calib": "images"}, False),
        ({"precision": "int8", "engine": "openvino", "calib": "images"}, False),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_export(tmp_path: Path, options, served) -> None:
    if served:
        assert ExportOptions(triton=tmp_path, **options).triton == tmp_path
    else:
        with pytest.raises(UserError, match="--triton goes with"):
            ExportOptions(triton=tmp_path, **options)


def test_plans_with_fused_heads_are_not_served(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Triton serves whole graphs, leave out --fused-heads"):
        ExportOptions(engine="tensorrt", fused_heads=True, triton=tmp_path)
    with pytest.raises(UserError, match=r"a\.plan ends with the feature maps"):
        write_model_repository(bundle, tmp_path, plan=entry(fused_heads=True))


def test_a_file_is_no_model_repository(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: give a folder"):
        ExportOptions(triton=tmp_path / "file")
