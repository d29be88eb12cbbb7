"""Half precision and INT8 graphs: where the casts and the Q/DQ pairs are, and that the embeddings stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.config import ModelConfig
from mgn_deploy.export.graph.rewrite import map_names, pixels_name, trunk_nodes
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.half import LARGEST_FLOAT16, float32_nodes, overflowing_nodes, to_half
from mgn_deploy.export.precision.quantise import (
    Placement,
    conv_groups,
    quantise,
)
from mgn_deploy.export.precision.ranges import BINS, TensorRange, measure_ranges
from mgn_deploy.export.precision.thresholds import METHODS, PERCENTILE, thresholds
from mgn_deploy.images.decode import read_crop
from mgn_deploy.train.model import MGN
from mgn_deploy.train.weights import load_weights, new_model

OPENVINO = ENGINES["openvino"].placement
ONNXRUNTIME = ENGINES["onnxruntime"].placement
TENSORRT = ENGINES["tensorrt"].placement
TENSORRT_RTX = ENGINES["tensorrt-rtx"].placement

Run = Callable[[onnx.ModelProto], np.ndarray]


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))[:24]])


@pytest.fixture(scope="module")
def graph(weights, trace) -> onnx.ModelProto:
    return trace(load_weights(weights))


@pytest.fixture(scope="module")
def ranges(graph, pixels) -> dict[str, TensorRange]:
    return measure_ranges(graph, pixels, histograms=True)


def every_output(graph: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pixels})


def by_onnxruntime(graph: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    return every_output(graph, pixels)[0]


def by_openvino(graph: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    core = openvino_core()
    model = core.read_model(graph.SerializeToString())
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    request.infer([pixels])
    return np.array(request.get_output_tensor(0).data)


def worst_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first.astype(np.float64) * second).sum(axis=1).min())


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


def scaled_up(model: MGN, factor: float) -> MGN:
    """A block's activations scaled up beyond float16 by its weights, and down again by the next."""
    block = model.trunk[4][0]
    for parameter in (block.bn1.weight, block.bn1.bias):
        parameter.data *= factor
    block.conv2.weight.data /= factor
    return model


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


# Thresholds


def test_max_cuts_nothing_off():
    assert thresholds({"a": TensorRange(3.5)}, "max") == {"a": 3.5}


def test_percentile_leaves_the_tail_out():
    histogram = np.zeros(BINS)
    histogram[:100] = 1000
    histogram[-1] = 1
    one = TensorRange(2048.0, histogram=histogram)
    assert thresholds({"a": one}, "percentile")["a"] == pytest.approx(100, abs=1)
    histogram[-1] = 100_000 * (1 - PERCENTILE) * 2
    assert thresholds({"a": one}, "percentile")["a"] == 2048


@pytest.mark.parametrize(("method", "most"), [("mse", 45), ("entropy", 20)])
def test_an_outlier_is_cut_off_and_an_even_spread_is_not(method, most):
    values = np.abs(np.random.default_rng(0).normal(size=100_000))
    outlier = np.append(values, 60.0)
    histogram = np.histogram(outlier, BINS, (0, 60.0))[0].astype(float)
    assert 2 < thresholds({"a": TensorRange(60.0, histogram=histogram)}, method)["a"] < most
    even = np.ones(BINS)
    assert thresholds({"a": TensorRange(1.0, histogram=even)}, method)["a"] > 0.95


def test_mse_is_the_best_of_all_thresholds_by_brute_force():
    values = np.abs(np.random.default_rng(1).standard_t(3, size=20_000))
    largest = values.max()
    histogram = np.histogram(values, BINS, (0, largest))[0].astype(float)
    found = thresholds({"a": TensorRange(largest, histogram=histogram)}, "mse")["a"]

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(((np.minimum(np.round(values / step), 127) * step - values) ** 2).mean())

    assert error(found) <= 1.05 * min(error(share * largest) for share in np.linspace(0.02, 1, 200))


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_scale_above_zero(method):
    assert thresholds({"a": TensorRange(0.0, histogram=np.zeros(BINS))}, method)["a"] > 0


# Q/DQ


INT8 = [
    (OPENVINO, by_openvino),
    (ONNXRUNTIME, by_onnxruntime),
    (TENSORRT, by_onnxruntime),
    (TENSORRT_RTX, by_onnxruntime),
]


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


# Imported models: instance norms in the trunk, generalised means in the heads


@pytest.fixture(scope="module", params=[("resnet50", "gem"), ("resnet18", "avg")], ids=" ".join)
def public(request, pixels) -> tuple[onnx.ModelProto, dict[str, TensorRange]]:
    backbone, pooling = request.param
    config = ModelConfig(
        backbone=backbone, base_width=8, reduced_width=8, height=96, width=32, ibn="a", stem_pool="ceil"
    )
    config = config.model_copy(update={"global_stride": 1, "pooling": pooling, "neck": "relu_norm"})
    graph = build_graph(new_model(config, seed=0))
    return graph, measure_ranges(graph, pixels, histograms=True)


def test_imported_models_in_float16_are_the_float32_ones(public, pixels):
    graph, ranges = public
    half = to_half(graph, "fp16", ranges)
    inlined = onnx.shape_inference.infer_shapes(half)
    types = {value.name: value.type.tensor_type.elem_type for value in inlined.graph.value_info}
    norms = [node for node in inlined.graph.node if node.op_type == "InstanceNormalization"]
    assert norms
    for node in [*norms, *(node for node in inlined.graph.node if node.op_type in ("Pow", "ReduceMean"))]:
        assert types[node.output[0]] == TensorProto.FLOAT, node.name
    expected = by_onnxruntime(graph, pixels)
    assert worst_cosine(by_onnxruntime(half, pixels), expected) > 0.9999
    assert worst_cosine(by_openvino(half, pixels), expected) > 0.9999


@pytest.mark.parametrize(("placement", "run"), INT8)
def test_imported_models_in_int8_are_near_the_float32_ones(public, pixels, placement, run):
    graph, ranges = public
    quantised = quantise(graph, ranges, thresholds(ranges, "max"), placement)
    assert worst_cosine(run(quantised, pixels), by_onnxruntime(graph, pixels)) > 0.98
