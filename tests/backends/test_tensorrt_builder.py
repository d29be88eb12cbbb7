"""Real TensorRT-RTX builds of a small bundle's graph, on a machine with or without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import layer_table
import numpy as np
import onnx
import pytest
from builds import SETTINGS, build
from layer_table import layers_from_log
from onnx import numpy_helper

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans
from mgn_deploy.backends.tensorrt.network import prepare
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.export.precision.quantise import quantise
from mgn_deploy.export.precision.ranges import TensorRange, measure_ranges
from mgn_deploy.images.decode import read_crop

TENSORRT_RTX = ENGINES["tensorrt-rtx"].placement


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> onnx.ModelProto:
    return onnx.load_from_string(Bundle.open(bundle_folder).read(GRAPH))


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    from PIL import Image

    return np.stack([read_crop(Image.fromarray(pixels), 96, 32) for pixels in draw_people(3)])


@pytest.fixture(scope="module")
def ranges(graph: onnx.ModelProto, crops: np.ndarray) -> dict[str, TensorRange]:
    return measure_ranges(graph, crops)


def convolutions_of(graph: onnx.ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in graph.graph.node)


def test_one_plan_is_built_for_each_compute_capability_without_its_gpu(graph: onnx.ModelProto) -> None:
    plans = build_plans(graph, SETTINGS, ("8.6", "8.9", "12.0"))
    entries = [plan.entry(plan.file_name) for plan in plans]
    assert [entry.file for entry in entries] == [f"tensorrt-rtx-{name}.plan" for name in ("sm86", "sm89", "sm120")]
    assert [entry.compute_capability for entry in entries] == ["8.6", "8.9", "12.0"]
    assert len({plan.content for plan in plans}) == 3


def test_without_a_capability_the_plan_is_for_any_gpu_from_ampere_on(graph: onnx.ModelProto) -> None:
    entry = build(graph, BuildSettings("tensorrt-rtx", (1, 1, 1))).entry("a.plan")
    assert (entry.compute_capability, entry.gpu, entry.batch) == (None, None, (1, 1, 1))


def test_the_layer_table_covers_the_network_from_pixels_to_embeddings(graph: onnx.ModelProto) -> None:
    layers = layers_from_log(build(graph).layers)
    tensors = {tensor["Name"]: tensor for layer in layers for tensor in (*layer["Inputs"], *layer["Outputs"])}
    assert tensors["images"]["Dimensions"] == [-1, 96, 32, 3]
    assert tensors["images"]["Datatype"] == "UInt8"
    assert tensors["embeddings"]["Dimensions"] == [-1, graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value]
    assert layer_table.summary(layers, graph)["convolutions"] == {"Float": convolutions_of(graph)}


def test_residual_additions_are_fused_into_the_convolutions(graph: onnx.ModelProto) -> None:
    summary = layer_table.summary(layers_from_log(build(graph).layers), graph)
    assert summary["additions_in_convolutions"] == summary["additions"] > 0


def test_a_half_precision_graph_computes_its_convolutions_in_half(graph: onnx.ModelProto, ranges) -> None:
    from mgn_deploy.export.precision.half import to_half

    half = to_half(graph, "fp16", ranges)
    plan = build(half)
    summary = layer_table.summary(layers_from_log(plan.layers), half)
    assert summary["convolutions"] == {"Half": convolutions_of(graph)}
    assert summary["additions_in_convolutions"] == summary["additions"] > 0


def to_int8(graph: onnx.ModelProto, ranges: dict[str, TensorRange]) -> onnx.ModelProto:
    thresholds = {name: max(one.largest, 1e-8) for name, one in ranges.items()}
    return quantise(graph, ranges, thresholds, TENSORRT_RTX)


def test_an_int8_graph_computes_its_convolutions_in_int8_and_the_additions_inside_them(
    graph: onnx.ModelProto, ranges
) -> None:
    int8 = to_int8(graph, ranges)
    layers = layers_from_log(build(int8).layers)
    summary = layer_table.summary(layers, int8)
    assert summary["convolutions"] == {"Int8": convolutions_of(graph)}
    assert summary["additions_in_convolutions"] == summary["additions"] > 0
    written = {layer_table.data_type(one) for x in layers if x["LayerType"] == "correlation" for one in x["Outputs"]}
    assert written == {"Half"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_mirror_average_does_not_double_the_weights(graph: onnx.ModelProto, ranges, precision: str) -> None:
    graph = graph if precision == "fp32" else to_int8(graph, ranges)
    plan = build(graph).content
    weights = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer if len(tensor.dims) > 2]
    orders = [{one.tobytes(), one.reshape(len(one), one.shape[1], -1).swapaxes(1, 2).tobytes()} for one in weights]
    found = [sum(plan.count(content) for content in contents) for contents in orders]
    assert set(found) <= {0, 1}  # none where the plan has it in another order yet
    assert sum(found) > len(weights) / 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_with_instance_norms_builds(trace, crops: np.ndarray, precision: str) -> None:
    from mgn_deploy.config import ModelConfig
    from mgn_deploy.train.weights import new_model

    config = ModelConfig(
        backbone="resnet18", base_width=8, reduced_width=16, height=96, width=32, ibn="a", branches=(1,)
    )
    graph = trace(new_model(config, seed=1))
    assert any(node.op_type == "InstanceNormalization" for node in graph.graph.node)
    if precision == "int8":
        graph = to_int8(graph, measure_ranges(graph, crops))
    kind = {"fp32": "Float", "int8": "Int8"}[precision]
    assert layer_table.summary(layers_from_log(build(graph).layers), graph)["convolutions"] == {
        kind: convolutions_of(graph)
    }


def test_preparing_a_graph_for_the_parser_changes_no_value(graph: onnx.ModelProto, crops: np.ndarray) -> None:
    import onnxruntime

    prepared = prepare(graph)
    results = [
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"images": crops})[0]
        for content in (graph.SerializeToString(), prepared.content)
    ]
    assert (prepared.input_name, prepared.height, prepared.width) == ("images", 96, 32)
    np.testing.assert_array_equal(*results)


def test_building_and_running_import_no_pytorch() -> None:
    code = (
        "import sys, mgn_deploy.backends.tensorrt.builder, mgn_deploy.export.triton, "
        "mgn_deploy.backends.tensorrt.runner as backend\n"
        "backend.TensorRtRtxBackend.missing()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_are_read_from_the_builders_log() -> None:
    text = (
        "Layers:\nName: conv1 + relu, LayerType: correlation, Inputs: [ "
        "{ Name: x, Dimensions: [-1,3,8,8], Datatype: Int8, "
        "Format: (NHWC) Channel major format }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,4,8,8], "
        "Datatype: Half, "
        "Format: (Linear) Row major }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: relu]\n\n"
        "I/O Tensors:\n Name: x, IOMode: Input\n"
    )
    [layer] = layers_from_log(text)
    assert (layer["Name"], layer["LayerType"], layer["Constants"]) == ("conv1 + relu", "correlation", [])
    assert layer["Inputs"] == [
        {"Name": "x", "Dimensions": [-1, 3, 8, 8], "Datatype": "Int8", "Format": "(NHWC) Channel major format"}
    ]
    assert layer_table.fused_nodes(layer) == ["conv1", "relu"]


def test_layers_are_read_from_the_inspector() -> None:
    layers = layer_table.layers_from_inspector('{"Layers": [{"Name": "a", "LayerType": "CaskConvolution"}, "b"]}')
    assert [layer["Name"] for layer in layers] == ["a", "b"]


def test_a_generated_kernel_that_names_a_convolution_has_not_taken_the_addition_into_it() -> None:
    def layer(kind: str) -> dict[str, str]:
        return {"LayerType": kind, "Metadata": "[ONNX Layer: conv][ONNX Layer: add]"}

    assert layer_table.fused_with([layer("kgen")], ["add"], ["conv"]) == []
    assert layer_table.fused_with([layer("kgen"), layer("correlation")], ["add"], ["conv"]) == ["add"]
