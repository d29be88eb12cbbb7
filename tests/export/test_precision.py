"""INT8 graphs: where the Q/DQ pairs are, and that the embeddings stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_runs import (
    INT8,
    ONNXRUNTIME,
    OPENVINO,
    TENSORRT,
    TENSORRT_RTX,
    by_onnxruntime,
    every_output,
    read_pixels,
    scaled_up,
    worst_cosine,
)
from onnx import TensorProto, numpy_helper

from mgn_deploy.export.graph.rewrite import trunk_nodes
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.half import LARGEST_FLOAT16, float32_nodes, overflowing_nodes
from mgn_deploy.export.precision.quantise import Placement, conv_groups, quantise
from mgn_deploy.export.precision.ranges import TensorRange, measure_ranges
from mgn_deploy.export.precision.thresholds import METHODS, thresholds
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


def dequantised(graph: onnx.ModelProto) -> set[str]:
    """What a DequantizeLinear writes, as it is or cast."""
    names = {node.output[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    return names | {node.output[0] for node in graph.graph.node if node.op_type == "Cast" and node.input[0] in names}


def additions(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Of two activations: a bias is a constant."""
    zone = {node.name for node in trunk_nodes(graph)}
    constants = {tensor.name for tensor in graph.graph.initializer}
    adds = [node for node in graph.graph.node if node.op_type == "Add" and node.name in zone]
    return [node for node in adds if not constants & {*node.input}]


def rescaled(quantised: onnx.ModelProto, node: onnx.NodeProto) -> np.ndarray:
    """What a quantised convolution multiplies by, in the end: its integers by their scale and, if a Mul follows, the
    channels' shares."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    producers = {output: node for node in quantised.graph.node for output in node.output}
    source = producers[node.input[1]]
    source = producers[source.input[0]] if source.op_type == "Cast" else source
    integers, scale = (constants[name] for name in source.input[:2])
    weight = integers * scale.reshape(-1, 1, 1, 1)
    for after in quantised.graph.node:
        if after.op_type == "Mul" and after.input[0] == node.output[0]:
            weight = weight * constants[after.input[1]].astype(np.float32).reshape(-1, 1, 1, 1)
    return weight


@pytest.mark.parametrize(("placement", "sides"), [(TENSORRT, 1), (OPENVINO, 1), (ONNXRUNTIME, 2), (TENSORRT_RTX, 0)])
def test_every_convolution_and_residual_addition_reads_what_it_should(graph, ranges, placement, sides):
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), placement)
    rounded = dequantised(quantised)
    convolutions = [node for node in quantised.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(node.op_type == "Conv" for node in graph.graph.node)
    for node in convolutions:
        assert {node.input[0], node.input[1]} <= rounded
        if len(node.input) > 2:
            assert (node.input[2] in rounded) == placement.integer_bias
    found = additions(quantised)
    assert len(found) == len(additions(graph)) > 0
    producers = {output: node for node in quantised.graph.node for output in node.output}
    for node, before in zip(found, additions(graph), strict=True):
        assert len(rounded & {*node.input}) == sides, node.name
        if sides < 2:
            # The convolution on the main side is read as it is, which is what lets it take the addition into its
            # kernel.
            main = next(name for name in node.input if name not in rounded and producers[name].op_type == "Conv")
            assert "downsample" not in producers[main].input[1] or not sides
            assert main in before.input


def test_one_scale_a_weight_rounds_by_channel_all_the_same_except_before_an_addition(graph, ranges):
    limits = thresholds(ranges, "max")
    by_channel, one_scale = (quantise(graph, ranges, limits, placement) for placement in (TENSORRT, TENSORRT_RTX))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in one_scale.graph.initializer}
    expected = {tensor.name: numpy_helper.to_array(tensor) for tensor in by_channel.graph.initializer}
    added = {name for node in additions(one_scale) for name in node.input}
    pairs = [[node for node in one.graph.node if node.op_type == "Conv"] for one in (one_scale, by_channel)]
    for node, before in zip(*pairs, strict=True):
        weight = before.input[1].removesuffix("/dq")
        assert constants[f"{weight}/scale"].shape == ()
        if node.output[0] in added:
            largest = np.abs(numpy_helper.to_array(next(t for t in graph.graph.initializer if t.name == weight))).max()
            np.testing.assert_allclose(rescaled(one_scale, node), rescaled(by_channel, before), atol=largest / 127)
        else:
            np.testing.assert_array_equal(constants[f"{weight}/q"], expected[f"{weight}/q"])
            np.testing.assert_allclose(rescaled(one_scale, node), rescaled(by_channel, before), rtol=1e-3)
    assert 0 < len(added) < 2 * len(pairs[0])


def test_between_the_pairs_tensorrt_rtx_has_float16(graph, ranges):
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), TENSORRT_RTX, in_float=["trunk.4.1"])
    inlined = onnx.shape_inference.infer_shapes(quantised)
    types = {value.name: value.type.tensor_type.elem_type for value in inlined.graph.value_info}
    for node in trunk_nodes(quantised):
        if node.op_type in ("Conv", "Relu", "Add", "Mul", "MaxPool"):
            assert types[node.output[0]] == TensorProto.FLOAT16, node.name
    for tensor in quantised.graph.initializer:
        assert not tensor.name.endswith("/scale") or tensor.data_type == TensorProto.FLOAT


def test_int8_with_float16_between_keeps_in_float32_what_would_overflow(weights, pixels):
    graph = build_graph(scaled_up(load_weights(weights), 1e6))
    ranges = measure_ranges(graph, pixels, histograms=True)
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), TENSORRT_RTX)
    large = {name for name, one in ranges.items() if one.largest > LARGEST_FLOAT16}
    inlined = onnx.shape_inference.infer_shapes(quantised)
    types = {value.name: value.type.tensor_type.elem_type for value in inlined.graph.value_info}
    found = {name: kind for name, kind in types.items() if name.split("/")[0] in large and kind != TensorProto.INT8}
    sums = {name for name in found if name.endswith("/raw")}  # they are held within float16
    assert {"scaled", "dq"} <= {name.split("/")[-1] for name in found.keys() - sums}
    assert {found[name] for name in found.keys() - sums} == {TensorProto.FLOAT}
    assert worst_cosine(by_onnxruntime(quantised, pixels), by_onnxruntime(graph, pixels)) > 0.98
    producers = {output: node.name for node in trunk_nodes(quantised) for output in node.output}
    kept = float32_nodes(quantised)
    assert {producers[name] for name in large & producers.keys()} <= {*kept}
    assert len(kept) < 12
    assert float32_nodes(quantise(graph, ranges, thresholds(ranges, "max"), TENSORRT)) == []


def test_sums_of_a_channel_with_a_tiny_share_are_within_float16(weights, pixels):
    """A channel's weights are a thousandth of the others' and all of one sign: its output is small, its sum of integers
    is not."""
    model, factor = load_weights(weights), 1000
    block = model.trunk[4][1]
    block.conv1.weight.data[1:] *= factor
    block.conv1.weight.data[0] = factor / 1000
    block.bn1.bias.data[0] = 50
    block.conv2.weight.data /= factor
    graph = build_graph(model)
    ranges = measure_ranges(graph, pixels)
    assert overflowing_nodes(graph, ranges) == []
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), TENSORRT_RTX)
    inlined = onnx.shape_inference.infer_shapes(quantised)
    halves = [v for v in inlined.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16]
    inlined.graph.output.extend(halves)
    embeddings, *values = every_output(inlined, pixels)
    assert sum(one.name.endswith("/raw") for one in halves) > 10
    assert [one.name for one, value in zip(halves, values, strict=True) if not np.isfinite(value).all()] == []
    assert worst_cosine(embeddings, by_onnxruntime(graph, pixels)) > 0.998


@pytest.mark.parametrize("placement", [TENSORRT, OPENVINO, ONNXRUNTIME, TENSORRT_RTX])
def test_zero_points_and_scales_are_what_the_engine_takes(graph, ranges, placement: Placement):
    limits = thresholds(ranges, "max")
    quantised = quantise(graph, ranges, limits, placement)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    for node in quantised.graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.input[1].removesuffix("/scale")
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            one = ranges[name]
            if placement.unsigned:
                assert zero.dtype == np.uint8
                assert zero == (128 if one.negative else 0)
                assert scale == pytest.approx(limits[name] / (127 if one.negative else 255))
            else:
                assert (zero.dtype, int(zero)) == (np.int8, 0)
                assert scale == pytest.approx(limits[name] / 127)
    originals = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    convolutions = [[node for node in one.graph.node if node.op_type == "Conv"] for one in (quantised, graph)]
    for node, before in zip(*convolutions, strict=True):
        original, integers = originals[before.input[1]], constants[f"{before.input[1]}/q"]
        assert integers.dtype == np.int8
        assert np.abs(integers).max() == placement.weight_levels
        if not placement.one_scale:
            assert np.abs(integers).reshape(len(integers), -1).max(axis=1) == pytest.approx(placement.weight_levels)
        step = np.abs(original).max() / placement.weight_levels
        assert np.abs(rescaled(quantised, node) - original).max() <= 0.51 * step


def test_each_activation_is_quantised_once(graph, ranges):
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), ONNXRUNTIME)
    names = [node.input[0] for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
    assert len(names) == len(set(names))


def test_groups_are_the_stem_and_every_block(graph):
    groups = conv_groups(graph)
    assert groups[:3] == ["trunk.0", "trunk.4.0", "trunk.4.1"]
    assert len(groups) == 1 + 2 + 2 + 1 + 3 * 3
    assert "branches.2.layer4.1" in groups


@pytest.mark.parametrize("placement", [OPENVINO, TENSORRT_RTX])
def test_a_group_in_float_has_no_pair(graph, ranges, placement):
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), placement, in_float=["trunk.4.1", "trunk.0"])
    rounded = dequantised(quantised)
    for node in quantised.graph.node:
        if node.op_type == "Conv":
            in_float = ".trunk.4.1." in node.input[1] or "trunk.0.weight" in node.input[1]
            assert (node.input[0] in rounded) != in_float
    everything = quantise(graph, ranges, thresholds(ranges, "max"), placement, in_float=conv_groups(graph))
    assert not dequantised(everything)


@pytest.mark.parametrize(("placement", "run"), INT8)
@pytest.mark.parametrize("method", METHODS)
def test_int8_embeddings_are_near_the_float32_ones(graph, ranges, pixels, placement, run, method):
    quantised = quantise(graph, ranges, thresholds(ranges, method), placement)
    assert worst_cosine(run(quantised, pixels), by_onnxruntime(graph, pixels)) > 0.99
