"""Fused heads: a graph cut at its feature maps, and what follows them, give the same embeddings as the whole graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from emulator.host import HostKernel, build_host
from emulator.reference import embed, stripe_pool_reduce
from layer_table import layers_from_log
from onnx import TensorProto

from mgn_deploy.backends.heads.cuda import map_type
from mgn_deploy.backends.heads.cut import FusedHeads, check_heads, cut_heads
from mgn_deploy.backends.opening import open_backend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.train.weights import load_weights, new_model

SMALL = ModelConfig(backbone="resnet18", base_width=16, reduced_width=16, height=96, width=32)
needs_builder = pytest.mark.skipif(
    bool(ENGINES["tensorrt-rtx"].import_problem()), reason="tensorrt-rtx-cu13 is not installed"
)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 96, 32, 3), np.uint8)


def run(graph: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pixels})


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> onnx.ModelProto:
    return onnx.load(bundle_folder / GRAPH)


def test_the_trunk_ends_with_the_maps_and_holds_none_of_the_heads(graph) -> None:
    trunk, _ = cut_heads(graph, SMALL)
    onnx.checker.check_model(trunk, full_check=True)
    shapes = [[dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] for output in trunk.graph.output]
    assert shapes == [[128, 3, 1], [128, 6, 2], [128, 6, 2]]  # layer4 with and without its stride
    # By these names an engine's outputs are brought into the order of the branches.
    assert [output.name for output in trunk.graph.output] == ["map_0", "map_1", "map_2"]
    names = [*(node.name for node in trunk.graph.node), *(tensor.name for tensor in trunk.graph.initializer)]
    assert not [name for name in names if name.startswith("heads")]


def test_a_graph_without_the_names_of_its_maps_is_one_sentence(graph) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    del other.metadata_props[:]
    with pytest.raises(UserError, match=r"no mgn_deploy\.feature_maps among its metadata: export it with mgn-deploy"):
        cut_heads(other, SMALL)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
def test_a_backend_that_runs_the_whole_graph_refuses_fused_heads(bundle_folder, name) -> None:
    with pytest.raises(CannotRun, match=f"{name} runs the whole graph: .* leave out --fused-heads"):
        open_backend(Bundle.open(bundle_folder), name, fused_heads=True)


def by_definition(heads: FusedHeads, maps: list[np.ndarray]) -> np.ndarray:
    """What the kernel has to compute of maps `[n or 2n, C, H_b, W_b]`, in float64."""

    def column(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[:, None]

    features = stripe_pool_reduce(
        maps,
        heads.config.branches,
        heads.weight.transpose(0, 2, 1),
        heads.bias[:, None],
        pooling=heads.config.pooling,
        powers=heads.power,
        neck=heads.config.neck,
        scale=column(heads.scale),
        shift=column(heads.shift),
    )
    return embed(features, heads.flip).astype(np.float32)


@pytest.mark.parametrize(
    "changes, flip",
    [
        ({"pooling": "avg"}, True),
        ({"pooling": "gem", "neck": "linear"}, False),
        ({"neck": "relu_norm", "branches": (1, 4)}, True),
        ({"branches": (5,), "global_stride": 1}, False),
    ],
)
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
    trunk, heads = cut_heads(graph, model.config)
    np.testing.assert_allclose(by_definition(heads, run(trunk, pixels)), run(graph, pixels)[0], atol=2e-6)


def test_half_precision_maps_stay_half_and_the_weights_are_rounded_alike(weights, trace, pixels) -> None:
    model = load_weights(weights)
    graph = to_half(trace(model), "fp16", {})
    trunk, heads = cut_heads(graph, model.config)
    assert {output.type.tensor_type.elem_type for output in trunk.graph.output} == {TensorProto.FLOAT16}
    np.testing.assert_array_equal(heads.weight, heads.weight.astype(np.float16))
    maps = run(trunk, pixels)
    assert {map_.dtype for map_ in maps} == {np.dtype(np.float16)}
    np.testing.assert_allclose(by_definition(heads, maps), run(graph, pixels)[0], atol=5e-4)


def test_bfloat16_weights_are_rounded_alike(weights, trace) -> None:
    model = load_weights(weights)
    trunk, heads = cut_heads(to_half(trace(model), "bf16", {}), model.config)
    assert {output.type.tensor_type.elem_type for output in trunk.graph.output} == {TensorProto.BFLOAT16}
    assert not (heads.weight.view(np.uint32) & 0xFFFF).any()
    assert heads.weight.any()


def test_a_width_that_the_kernel_does_not_take_is_one_sentence() -> None:
    model = new_model(SMALL.model_copy(update={"reduced_width": 24}))
    with pytest.raises(
        UserError, match="reduced width divisible by 16; this model has 3 and 24: leave out --fused-heads"
    ):
        check_heads(model.config, True, 64)


def test_more_branches_than_the_kernel_takes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="at most 4 branches"):
        check_heads(SMALL.model_copy(update={"branches": (1, 2, 3, 2, 1)}), True, 64)


def test_a_batch_that_the_kernel_does_not_take_is_one_sentence(weights, tmp_path) -> None:
    options = ExportOptions(fused_heads=True, engine="tensorrt-rtx", batch=(1, 8, 513))
    with pytest.raises(UserError, match="at most 512 images a call"):
        export_bundle(weights, tmp_path / "b", options)
    assert not (tmp_path / "b").exists()


@needs_builder
def test_an_exported_plan_with_fused_heads_says_so_and_the_graph_stays_whole(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ExportOptions(fused_heads=True, engine="tensorrt-rtx", compute_capabilities=("8.9",), batch=(1, 2, 4))
    bundle = export_bundle(weights, tmp_path / "b", options)
    [entry] = bundle.manifest.engines
    assert (entry.file, entry.fused_heads) == ("tensorrt-rtx-sm89-fused-heads.plan", True)
    assert bundle.manifest.has_fused_heads("tensorrt-rtx")
    assert not bundle.manifest.has_fused_heads("onnxruntime")
    assert [output.name for output in onnx.load(bundle.folder / GRAPH).graph.output] == ["embeddings"]
    assert bundle.manifest.proofs["onnxruntime"].passed


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "nchw"), ("float16", "nhwc"), ("bfloat16", "nhwc")])
def test_the_kernel_itself_makes_the_embeddings_from_the_bundles_numbers(
    graph, pixels, tmp_path_factory, dtype, layout
) -> None:
    """The CUDA source, run by the emulator, on the trunk's maps of images and mirrors."""
    trunk, heads = cut_heads(graph, SMALL)
    maps = run(trunk, pixels)
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
    np.testing.assert_allclose(
        found, by_definition(heads, maps), atol={"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    )


@needs_builder
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_writes_its_maps_channels_last_and_runs_no_heads(weights, precision) -> None:
    model = load_weights(weights)
    graph = build_graph(model)
    if precision != "fp32":
        graph = to_half(graph, precision, {})
    settings = BuildSettings("tensorrt-rtx", (1, 2, 4), "8.9", fused_heads=True)
    [plan] = build_plans(graph, settings, use_cache=False)
    layers = layers_from_log(plan.layers)
    names = {"map_0", "map_1", "map_2"}
    formats = {o["Name"]: o["Format"] for layer in layers for o in layer["Outputs"] if o["Name"] in names}
    assert set(formats) == names
    assert all("NHWC" in text for text in formats.values()), formats
    assert not [layer["Name"] for layer in layers if "heads/" in layer["Name"]]


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
    sentence = f"maps as {', '.join(dtypes)} in {', '.join(layouts)}, .* leave out --fused-heads"
    with pytest.raises(UserError, match=sentence):
        map_type(dtypes, layouts, [(-1, 8, 2, 2), (-1, 8, 4, 2)])


# What follows needs a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", [row.name for row in ENGINES.values() if row.fused_heads])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_gpu_the_engine_and_the_kernel_give_the_references_embeddings(
    weights, bundle_folder, pixels, tmp_path, monkeypatch, name, precision
) -> None:
    row = ENGINES[name]
    reason = row.load().missing()
    if reason:
        pytest.skip(reason)
    if precision not in row.precisions:
        pytest.skip(f"{name} has no {precision} convolution")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = open_backend(Bundle.open(bundle_folder), "onnxruntime")(pixels)
    bundle = export_bundle(weights, tmp_path / "b", ExportOptions(precision=precision))
    engine = row.load().open(bundle, fused_heads=True)
    for size in (1, 3, 5, 5, 1):  # the second time by a CUDA graph
        found = engine(pixels[:size])
        least = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}[precision]
        assert (found * expected[:size]).sum(axis=1).min() > least
    np.testing.assert_array_equal(engine(pixels), engine(pixels))
