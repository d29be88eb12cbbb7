"""Half precision graphs: where the casts are, what stays in float32, and that the embeddings stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_runs import by_onnxruntime, by_openvino, read_pixels, scaled_up, worst_cosine
from onnx import TensorProto, numpy_helper

from mgn_deploy.export.graph.rewrite import map_names, pixels_name, trunk_nodes
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.half import LARGEST_FLOAT16, float32_nodes, overflowing_nodes, to_half
from mgn_deploy.export.precision.ranges import TensorRange, measure_ranges
from mgn_deploy.train.weights import load_weights


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return read_pixels(crops)


@pytest.fixture(scope="module")
def graph(weights, trace) -> onnx.ModelProto:
    return trace(load_weights(weights))


@pytest.fixture(scope="module")
def ranges(graph, pixels) -> dict[str, TensorRange]:
    return measure_ranges(graph, pixels, histograms=True)


# Ranges


def test_ranges_are_those_of_the_activations(graph, ranges, pixels):
    names = list(ranges)
    assert names == [pixels_name(graph), *(output for node in trunk_nodes(graph) for output in node.output)]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = (pixels / 255 - mean) / std
    assert ranges[names[0]].largest == pytest.approx(np.abs(normalised).max(), rel=1e-5)
    assert ranges[names[0]].negative
    for name in map_names(graph):
        assert not ranges[name].negative  # after a ReLU
    assert ranges[names[0]].histogram.sum() == 2 * pixels.size  # with the mirrors


def test_an_activation_that_is_nan_has_no_bound(graph, pixels):
    broken = onnx.ModelProto()
    broken.CopyFrom(graph)
    weight = next(tensor for tensor in broken.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(np.full(weight.dims, np.nan, np.float32), weight.name))
    assert any(one.largest == np.inf for one in measure_ranges(broken, pixels[:2]).values())


# Half precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_holds_the_trunk_and_nothing_after_the_pools(graph, ranges, precision):
    half = to_half(graph, precision, ranges)
    assert float32_nodes(half) == []
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    constants = {tensor.name: tensor for tensor in half.graph.initializer}
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in graph.graph.node)
    for node in convolutions:
        assert all(constants[name].data_type == kind for name in node.input[1:])
    casts = [node for node in half.graph.node if node.op_type == "Cast" and node.name.startswith("cast/")]
    assert [cast.input[0] for cast in casts] == ["cat", "heads/pooled"]  # the pixels and the pooled vectors, once each
    inlined = onnx.shape_inference.infer_shapes(half)
    types = {value.name: value.type.tensor_type.elem_type for value in inlined.graph.value_info}
    for operator in ("MatMul", "ReduceMean", "ReduceL2"):
        for node in inlined.graph.node:
            if node.op_type == operator:
                assert types[node.output[0]] == TensorProto.FLOAT
    assert len(half.SerializeToString()) < 0.7 * len(graph.SerializeToString())


def test_float16_embeddings_are_the_float32_ones(graph, ranges, pixels):
    half = to_half(graph, "fp16", ranges)
    expected = by_onnxruntime(graph, pixels)
    assert worst_cosine(by_onnxruntime(half, pixels), expected) > 0.99999
    assert worst_cosine(by_openvino(half, pixels), expected) > 0.99999


def test_bfloat16_embeddings_are_the_float32_ones(graph, ranges, pixels):
    half = to_half(graph, "bf16", ranges)
    assert worst_cosine(by_openvino(half, pixels), by_onnxruntime(graph, pixels)) > 0.9999


def test_what_would_overflow_stays_in_float32(weights, pixels):
    graph = build_graph(scaled_up(load_weights(weights), 1e4))
    ranges = measure_ranges(graph, pixels)
    assert max(one.largest for one in ranges.values()) > LARGEST_FLOAT16 / 4
    half = to_half(graph, "fp16", ranges)
    kept = float32_nodes(half)
    assert 2 <= len(kept) <= 6
    assert kept == overflowing_nodes(graph, ranges)
    expected = by_onnxruntime(graph, pixels)
    assert worst_cosine(by_onnxruntime(half, pixels), expected) > 0.9999
    inlined = onnx.shape_inference.infer_shapes(half)
    types = {value.name: value.type.tensor_type.elem_type for value in inlined.graph.value_info}
    for name, one in ranges.items():
        if one.largest > LARGEST_FLOAT16 / 4:
            assert types[name] == TensorProto.FLOAT
    assert float32_nodes(to_half(graph, "bf16", ranges)) == []


def test_a_weight_beyond_float16_stays_in_float32(graph):
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    node = next(node for node in trunk_nodes(changed) if node.op_type == "Conv")
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert overflowing_nodes(changed, {}) == [node.name]


def test_maps_go_to_the_heads_in_float32_where_one_of_them_would_overflow(weights, pixels):
    model = load_weights(weights)
    last = model.branches[1].layer4[-1].bn2
    for parameter in (last.weight, last.bias):
        parameter.data *= 1e6
    for reduction in model.branches[1].reductions:
        reduction[0].weight.data /= 1e6
    graph = build_graph(model)
    ranges = measure_ranges(graph, pixels)
    assert [ranges[name].largest > LARGEST_FLOAT16 for name in map_names(graph)] == [False, True, False]
    half = to_half(graph, "fp16", ranges)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(half).graph.value_info
    }
    assert {types[name] for name in map_names(half)} == {TensorProto.FLOAT}
    assert 0 < len(float32_nodes(half)) < 6
    expected = by_onnxruntime(graph, pixels)
    assert worst_cosine(by_onnxruntime(half, pixels), expected) > 0.9999
    assert worst_cosine(by_openvino(half, pixels), expected) > 0.9999
