"""Bundles with fused heads: the graph ends with the maps, and what follows gives the same embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from emulator.host import HostKernel, build_host
from in_process import mgn_deploy
from onnx import TensorProto

from mgn_deploy.backends import tensorrt_rtx
from mgn_deploy.backends.heads.cuda import map_type
from mgn_deploy.backends.heads.cut import check_heads, cut_heads
from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.backends.onnxruntime import cuda as onnxruntime_cuda
from mgn_deploy.backends.registry import open_backend
from mgn_deploy.backends.tensorrt import runner as tensorrt
from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans
from mgn_deploy.backends.tensorrt.package import import_problem_of
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH, HEADS, FileEntry, Manifest
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.triton import write_model_repository
from mgn_deploy.files import sha256_file
from mgn_deploy.train.weights import load_weights, new_model

SMALL = ModelConfig(backbone="resnet18", base_width=16, reduced_width=16, height=96, width=32)
needs_builder = pytest.mark.skipif(bool(import_problem_of("tensorrt_rtx")), reason="tensorrt-rtx-cu13 is not installed")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 96, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def fused_folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "bundle"
    bundle = export_bundle(weights, folder, heads="fused")
    assert all(proof.passed for proof in bundle.manifest.proofs.values()), bundle.manifest.proofs
    return folder


def run(graph: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pixels})


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_fused_bundle_gives_the_plain_ones_embeddings(fused_folder, bundle_folder, pixels, backend) -> None:
    fused, plain = (open_backend(Bundle.open(folder), backend)(pixels) for folder in (fused_folder, bundle_folder))
    assert (fused.dtype, fused.shape) == (np.float32, plain.shape)
    np.testing.assert_allclose(fused, plain, atol=2e-6)


def test_a_fused_bundle_is_proven_for_every_engine_here(fused_folder) -> None:
    bundle = Bundle.open(fused_folder)
    assert set(bundle.manifest.proofs) >= {"openvino", "onnxruntime", "torch"}
    assert bundle.manifest.heads == "fused"


def test_its_graph_ends_with_the_maps_and_holds_none_of_the_heads(fused_folder) -> None:
    graph = onnx.load(fused_folder / GRAPH)
    onnx.checker.check_model(graph, full_check=True)
    shapes = [[dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] for output in graph.graph.output]
    assert shapes == [[128, 3, 1], [128, 6, 2], [128, 6, 2]]  # layer4 with and without its stride
    # By these names an engine's outputs are brought into the order of the branches.
    assert [output.name for output in graph.graph.output] == ["map_0", "map_1", "map_2"]
    assert not graph.functions
    assert not [tensor.name for tensor in graph.graph.initializer if tensor.name.startswith("heads.")]


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "avg"},
        {"pooling": "gem", "neck": "linear"},
        {"neck": "relu_norm", "branches": (1, 4)},
        {"branches": (5,), "global_stride": 1},
    ],
)
@pytest.mark.parametrize("flip", [True, False])
def test_cutting_changes_no_kind_of_heads(changes, flip, pixels) -> None:
    model = new_model(SMALL.model_copy(update=changes), seed=3)
    with torch.no_grad():  # untrained norms are all ones and zeros: a forgotten one would not show
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(-0.2, 0.2)
    graph = build_graph(model, flip)
    trunk, heads = cut_heads(graph, model.config, flip)
    np.testing.assert_allclose(heads(run(trunk, pixels)), run(graph, pixels)[0], atol=2e-6)


def test_half_precision_maps_stay_half_and_the_weights_are_rounded_alike(weights, trace, pixels) -> None:
    model = load_weights(weights)
    graph, _ = to_half(trace(model), "fp16", {})
    trunk, heads = cut_heads(graph, model.config, True)
    assert {output.type.tensor_type.elem_type for output in trunk.graph.output} == {TensorProto.FLOAT16}
    np.testing.assert_array_equal(heads.weight, heads.weight.astype(np.float16))
    maps = run(trunk, pixels)
    assert {map_.dtype for map_ in maps} == {np.dtype(np.float16)}
    np.testing.assert_allclose(heads(maps), run(graph, pixels)[0], atol=5e-4)


def test_bfloat16_weights_are_rounded_alike(weights, trace) -> None:
    model = load_weights(weights)
    trunk, heads = cut_heads(to_half(trace(model), "bf16", {})[0], model.config, True)
    assert {output.type.tensor_type.elem_type for output in trunk.graph.output} == {TensorProto.BFLOAT16}
    assert not (heads.weight.view(np.uint32) & 0xFFFF).any()
    assert heads.weight.any()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_every_precision_can_have_fused_heads(weights, crops, tmp_path, precision) -> None:
    bundle = export_bundle(weights, tmp_path / "b", precision=precision, heads="fused", calib=crops, max_drop=100)
    assert bundle.manifest.proofs["openvino"].mean_cosine > 0.99
    assert bundle.manifest.heads == "fused"


def test_heads_survive_the_file(fused_folder) -> None:
    heads = FusedHeads.read(Bundle.open(fused_folder))
    assert heads.weight.dtype == np.float32
    assert heads.weight.shape == (8, 16, 128)
    assert (heads.scale, heads.shift, heads.power) == (None, None, None)


def test_numbers_that_only_some_heads_have_survive_the_file(tmp_path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=size).astype(np.float32) for size in ((8, 16, 64), (8, 16), (8, 16), (8, 16), (8,))]
    heads = FusedHeads(SMALL, True, *arrays)
    (tmp_path / HEADS).write_bytes(heads.to_bytes())
    entry = FileEntry(sha256=sha256_file(tmp_path / HEADS), size=(tmp_path / HEADS).stat().st_size)
    manifest = Manifest.model_construct(model=SMALL, flip=True, files={HEADS: entry})
    found = FusedHeads.read(Bundle(tmp_path, manifest))
    for name, expected in zip(("weight", "bias", "scale", "shift", "power"), arrays, strict=True):
        np.testing.assert_array_equal(getattr(found, name), expected)


def test_other_heads_are_another_bundle(fused_folder) -> None:
    manifest = Bundle.open(fused_folder).manifest
    other = manifest.files[HEADS].model_copy(update={"sha256": "0" * 64})
    assert manifest.model_copy(update={"files": {**manifest.files, HEADS: other}}).id != manifest.id


def test_triton_is_not_given_half_a_network(fused_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="Triton serves whole graphs"):
        write_model_repository(Bundle.open(fused_folder), tmp_path / "repository")


def test_a_flipped_byte_in_the_heads_is_refused(fused_folder, tmp_path) -> None:
    shutil.copytree(fused_folder, tmp_path / "b")
    content = bytearray((tmp_path / "b" / HEADS).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b" / HEADS).write_bytes(content)
    with pytest.raises(UserError, match=r"heads\.npz is not what was exported"):
        open_backend(Bundle.open(tmp_path / "b"), "onnxruntime")


def test_a_width_that_the_kernel_does_not_take_is_one_sentence() -> None:
    model = new_model(SMALL.model_copy(update={"reduced_width": 24}))
    with pytest.raises(UserError, match="reduced width divisible by 16; this model has 3 and 24: use --heads plain"):
        check_heads(model.config, True, 64)


def test_more_branches_than_the_kernel_takes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="at most 4 branches"):
        check_heads(SMALL.model_copy(update={"branches": (1, 2, 3, 2, 1)}), True, 64)


def test_a_batch_that_the_kernel_does_not_take_is_one_sentence(weights, tmp_path) -> None:
    build = BuildSettings("tensorrt_rtx", (1, 8, 513))
    with pytest.raises(UserError, match="at most 512 images a call"):
        export_bundle(weights, tmp_path / "b", heads="fused", engine="tensorrt-rtx", build=build)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--heads", "half"), "--heads half: choose plain, fused"),
        (("--heads", "fused", "--triton", "triton"), "--triton goes with --heads plain"),
    ],
)
def test_the_command_line_refuses_what_does_not_go(weights, tmp_path, arguments, sentence) -> None:
    result = mgn_deploy("export", weights, "-o", tmp_path / "b", *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "nchw"), ("float16", "nhwc"), ("bfloat16", "nhwc")])
def test_the_kernel_itself_makes_the_embeddings_from_the_bundles_numbers(
    fused_folder, pixels, tmp_path_factory, dtype, layout
) -> None:
    """The CUDA source, run by the emulator, on the trunk's maps of images and mirrors."""
    heads = FusedHeads.read(Bundle.open(fused_folder))
    maps = run(onnx.load(fused_folder / GRAPH), pixels)
    kernel = HostKernel(build_host(tmp_path_factory.mktemp("host")))
    found = kernel.run(
        maps,
        heads.config.branches,
        heads.weight.transpose(0, 2, 1),
        heads.bias,
        dtype=dtype,
        layout=layout,
        output="mirror_embeddings",
    )
    np.testing.assert_allclose(found, heads(maps), atol={"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype])


@needs_builder
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_writes_its_maps_channels_last_and_runs_no_heads(weights, precision) -> None:
    model = load_weights(weights)
    graph = build_graph(model)
    if precision != "fp32":
        graph, _ = to_half(graph, precision, {})
    trunk, _ = cut_heads(graph, model.config, True)
    [plan] = build_plans(trunk, BuildSettings("tensorrt_rtx", (1, 2, 4), "8.9"), use_cache=False)
    names = {output.name for output in trunk.graph.output}
    formats = {o["Name"]: o["Format"] for layer in plan.layers for o in layer["Outputs"] if o["Name"] in names}
    assert set(formats) == names
    assert all("NHWC" in text for text in formats.values()), formats
    assert not [layer["Name"] for layer in plan.layers if "heads/" in layer["Name"]]


@pytest.mark.parametrize(
    ("dtypes", "layouts"),
    [
        (["float16", "float32"], ["nhwc", "nhwc"]),
        (["float16", "float16"], ["nhwc", "nchw"]),
        (["another type", "another type"], ["nhwc", "nhwc"]),
        (["float16", "float16"], ["another layout", "another layout"]),
    ],
)
def test_maps_that_the_kernel_does_not_take_are_one_sentence(dtypes, layouts) -> None:
    sentence = f"maps as {', '.join(dtypes)} in {', '.join(layouts)}, .* --heads plain"
    with pytest.raises(UserError, match=sentence):
        map_type(dtypes, layouts, [(-1, 8, 2, 2), (-1, 8, 4, 2)])


# What follows needs a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("module", [tensorrt, tensorrt_rtx, onnxruntime_cuda])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu_the_engine_and_the_kernel_give_the_references_embeddings(
    weights, fused_folder, pixels, tmp_path, monkeypatch, module, precision
) -> None:
    reason = module.missing()
    if reason:
        pytest.skip(reason)
    if module is onnxruntime_cuda and precision == "bf16":
        pytest.skip("ONNX Runtime has no bfloat16 convolution for CUDA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = open_backend(Bundle.open(fused_folder), "onnxruntime")(pixels)
    bundle = export_bundle(weights, tmp_path / "b", precision=precision, heads="fused")
    engine = module.open_engine(bundle)
    for size in (1, 3, 5, 5, 1):  # the second time by a CUDA graph
        found = engine(pixels[:size])
        least = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}[precision]
        assert (found * expected[:size]).sum(axis=1).min() > least
    np.testing.assert_array_equal(engine(pixels), engine(pixels))
