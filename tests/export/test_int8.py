"""INT8 within a budget: the method, the sweep, the corrected biases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.heads.cut import FEATURE_MAPS
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import UserError
from mgn_deploy.export.precision.int8 import agreement_drop, build_int8
from mgn_deploy.export.precision.profile import PROFILERS, block_milliseconds
from mgn_deploy.export.precision.quantise import conv_groups, quantise
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.precision.thresholds import thresholds
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.images.decode import read_crop
from mgn_deploy.train.weights import load_weights

OPENVINO = ENGINES["openvino"].placement


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))])


@pytest.fixture
def open_graph(bundle_folder):
    manifest = Bundle.open(bundle_folder).manifest

    def open_graph(graph: onnx.ModelProto) -> Backend:
        return ENGINES["openvino"].load().open_graph(graph.SerializeToString(), manifest.model)

    return open_graph


def milliseconds(graph: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    return block_milliseconds(graph, images, "openvino")


def test_the_method_with_the_least_error_is_taken_and_a_kept_budget_needs_no_sweep(weights, trace, pixels, open_graph):
    graph = trace(load_weights(weights))
    plain = trace(load_weights(weights), flip=False)
    drop = agreement_drop(pixels, run_in_batches(open_graph(graph), pixels))
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, drop, 100, milliseconds)
    plain_methods = {name for name in made.errors if not name.endswith("+bias")}
    assert plain_methods == {"max", "percentile", "mse", "entropy"}
    assert made.errors.keys() - plain_methods == {f"{min(plain_methods, key=made.errors.__getitem__)}+bias"}
    assert made.errors[made.method] == min(made.errors.values())
    assert 0 < made.errors[made.method] < 0.01
    assert (made.sweep, made.in_float) == ([], [])
    assert made.drop == pytest.approx(drop(open_graph(made.graph)), abs=2)


def test_the_block_that_int8_breaks_is_found_and_left_in_float(weights, trace, pixels, open_graph, said):
    """One channel of a block is a thousand times the others, so that one scale for the tensor rounds the others
    away."""
    model = load_weights(weights)
    block = model.trunk[4][1]
    for parameter in (block.bn1.weight, block.bn1.bias):
        parameter.data[0] *= 1000
    block.conv2.weight.data[:, 0] /= 1000
    graph, plain = trace(model), trace(model, flip=False)
    reference = run_in_batches(open_graph(graph), pixels)
    drop = agreement_drop(pixels, reference)
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, drop, 5, milliseconds)
    assert max(made.sweep, key=lambda row: row.error).block == "trunk.4.1"
    assert {row.block for row in made.sweep} == set(conv_groups(plain))
    rates = [row.error / max(row.milliseconds, 1e-3) for row in made.sweep]
    assert rates == sorted(rates, reverse=True)
    assert "trunk.4.1" in made.in_float
    assert len(made.in_float) < len(made.sweep)
    assert made.drop <= 5
    assert made.drop == drop(open_graph(made.graph))
    assert any("looking for the blocks that lose most" in sentence for sentence in said)
    for row in made.sweep:
        assert any(f"{row.block} alone in INT8: 1 - cosine {row.error:.1e}, saves" in sentence for sentence in said)


def test_a_budget_that_cannot_be_kept_is_one_sentence(weights, trace, pixels, open_graph):
    graph, plain = trace(load_weights(weights)), trace(load_weights(weights), flip=False)
    with pytest.raises(UserError, match=r"no INT8 graph loses at most 0\.5 points"):
        build_int8(graph, plain, pixels, OPENVINO, open_graph, lambda engine: 1.0, 0.5, milliseconds)


def test_of_blocks_that_err_alike_the_one_that_saves_less_time_goes_back_first(weights, trace, pixels, open_graph):
    """The first blocks' time is of the test: what is asked is the order."""
    graph, plain = trace(load_weights(weights)), trace(load_weights(weights), flip=False)
    names = conv_groups(plain)
    saved = {name: 10.0**-number for number, name in enumerate(names[:4])}

    def milliseconds(model, images):
        quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return {} if quantised else {name: saved.get(name, 1e6) for name in names}

    drops = iter([1.0, *[0.0] * 20])
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, lambda engine: next(drops), 0.5, milliseconds)
    assert [row.milliseconds for row in made.sweep if row.block in saved] == pytest.approx(
        sorted(saved.values()), rel=1e-6
    )
    assert made.in_float == [made.sweep[0].block]


@pytest.mark.parametrize("engine", PROFILERS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_profiler_has_a_time_of_every_block(weights, trace, pixels, engine, precision):
    graph = trace(load_weights(weights), flip=False)
    if precision == "int8":
        ranges = measure_ranges(graph, pixels, histograms=True)
        graph = quantise(graph, ranges, thresholds(ranges, "max"), ENGINES[engine].placement)
    found = block_milliseconds(graph, pixels[:4], engine)
    assert set(found) == set(conv_groups(graph))
    assert min(found.values()) > 0


def test_every_engine_that_runs_candidates_has_a_profiler():
    assert {row.calibrated_by for row in ENGINES.values() if row.placement} == set(PROFILERS)


@pytest.mark.parametrize("engine", [name for name, row in ENGINES.items() if row.placement])
def test_corrected_biases_bring_the_mean_of_every_convolutions_output_back(weights, trace, pixels, engine):
    """Weights of few levels, so that their rounding moves the means; pixels as they are, so that nothing else does."""
    graph = trace(load_weights(weights), flip=False)
    ranges = measure_ranges(graph, pixels, histograms=True)
    placement = replace(ENGINES[engine].placement, weight_levels=7)
    stem = conv_groups(graph)[0]
    others = [name for name in conv_groups(graph) if name != stem]
    name = next(node.output[0] for node in graph.graph.node if node.op_type == "Conv")
    means = []
    for correct in (None, False, True):
        made = graph
        if correct is not None:
            limits = thresholds(ranges, "max")
            made = quantise(graph, ranges, limits, placement, others, correct_bias=correct)
        exposed = onnx.ModelProto()
        exposed.CopyFrom(made)
        exposed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        session = onnxruntime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
        means.append(session.run([name], {"images": pixels})[0].astype(np.float64).mean((0, 2, 3)))
    before, rounded, corrected = means
    assert np.abs(corrected - before).mean() < 0.3 * np.abs(rounded - before).mean()


def test_the_bias_of_a_grouped_convolution_is_corrected_too(pixels):
    """As in a ResNeXt; every weight is rounded down, so that each channel's mean moves."""
    weight = np.full((6, 1, 3, 3), 0.049, np.float32)
    weight[:, :, 1, 1] = 1
    nodes = [
        onnx.helper.make_node("Cast", ["images"], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["pixels", "trunk.0.weight", "bias"], ["map_0"], name="conv", group=3),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "grouped",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 96, 32, 3])],
        [onnx.helper.make_tensor_value_info("map_0", onnx.TensorProto.FLOAT, ["batch", 6, 94, 30])],
        [
            onnx.numpy_helper.from_array(weight, "trunk.0.weight"),
            onnx.numpy_helper.from_array(weight[:, 0, 0, 0], "bias"),
        ],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.metadata_props.add(key=FEATURE_MAPS, value="map_0")
    ranges = measure_ranges(model, pixels, histograms=True)
    limits, placement = thresholds(ranges, "max"), replace(OPENVINO, weight_levels=7)
    before, rounded, corrected = (
        onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(["map_0"], {"images": pixels})[0]
        .mean((0, 2, 3))
        for made in (
            model,
            quantise(model, ranges, limits, placement),
            quantise(model, ranges, limits, placement, correct_bias=True),
        )
    )
    assert np.abs(corrected - before).max() < 0.1 * np.abs(rounded - before).min()


def test_activations_that_are_not_finite_are_one_sentence(weights, trace, pixels, open_graph):
    model = load_weights(weights)
    model.trunk[4][1].bn1.weight.data[0] = 3e38
    plain = trace(model, flip=False)
    with pytest.raises(UserError, match="is not finite on these images"):
        build_int8(plain, plain, pixels, OPENVINO, open_graph, lambda engine: 0.0, 0.5, milliseconds)
