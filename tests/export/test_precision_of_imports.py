"""Imported models in half precision and INT8: instance norms in the trunk, generalised means in the heads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_runs import INT8, by_onnxruntime, by_openvino, read_pixels, worst_cosine
from onnx import TensorProto

from mgn_deploy.config import ModelConfig
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.quantise import quantise
from mgn_deploy.export.precision.ranges import TensorRange, measure_ranges
from mgn_deploy.export.precision.thresholds import thresholds
from mgn_deploy.train.weights import new_model


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return read_pixels(crops)


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
