"""Stripe-pool-reduce: the definition against a loop over every pixel, the ONNX heads against it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from emulator.reference import embed, stripe_pool, stripe_pool_reduce
from onnx import helper
from onnx.reference import ReferenceEvaluator

from mgn_deploy.config import ModelConfig, features_of
from mgn_deploy.export.graph import heads
from mgn_deploy.train.model import Embedding, fold_batch_norms
from mgn_deploy.train.weights import load_weights

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine

# Branches and each map's rows and columns: the paper's, its ablations', and heights that do not divide.
CASES = [
    ((1, 2, 3), ((12, 4), (24, 8), (24, 8))),
    ((1,), ((3, 1),)),
    ((2, 4), ((6, 2), (6, 2))),
    ((1, 2, 4), ((5, 3), (7, 3), (7, 3))),
    ((3, 1), ((5, 2), (1, 1))),
    ((8,), ((3, 2),)),
]


def random_case(branches, sizes, n=2, channels=5, reduced=4, seed=0):
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=(n, channels, *size)).astype(np.float32) for size in sizes]
    features = sum(map(features_of, branches))
    weight = rng.normal(size=(features, channels, reduced)).astype(np.float32)
    bias = rng.normal(size=(features, 1, reduced)).astype(np.float32)
    return maps, weight, bias


def random_choices(branches, reduced=4, seed=1) -> dict[str, np.ndarray]:
    """Powers, and the scales and shifts of a norm after the ReLU."""
    rng = np.random.default_rng(seed)
    features = sum(map(features_of, branches))
    return {
        "powers": rng.uniform(1.5, 4.5, features).astype(np.float32),
        "scale": rng.normal(size=(features, 1, reduced)).astype(np.float32),
        "shift": rng.normal(size=(features, 1, reduced)).astype(np.float32),
    }


def pooled_value(values: list[float], pooling: str, power: float) -> float:
    if pooling == "max":
        return max(values)
    if pooling == "avg":
        return sum(values) / len(values)
    return (sum(max(value, 1e-6) ** power for value in values) / len(values)) ** (1 / power)


def plain_loop(
    maps, branches, weight, bias, pooling="max", neck="relu", powers=None, scale=None, shift=None
) -> np.ndarray:
    """Each output number from the pixels, one at a time; stripes as torch's adaptive pooling has them."""
    n, channels = maps[0].shape[:2]
    rows = []
    for image in range(n):
        row, f = [], 0
        for map_, stripes in zip(maps, branches, strict=True):
            height = map_.shape[2]
            parts = [range(height)]
            if stripes > 1:
                parts += [
                    range(i * height // stripes, int(np.ceil((i + 1) * height / stripes))) for i in range(stripes)
                ]
            for part in parts:
                power = 1.0 if powers is None else float(powers[f])
                pooled = [
                    pooled_value([float(value) for y in part for value in map_[image, c, y]], pooling, power)
                    for c in range(channels)
                ]
                for r in range(weight.shape[2]):
                    value = sum(pooled[c] * float(weight[f, c, r]) for c in range(channels)) + float(bias[f, 0, r])
                    if neck != "linear":
                        value = max(0.0, value)
                    if neck == "relu_norm":
                        value = value * float(scale[f, 0, r]) + float(shift[f, 0, r])
                    row.append(value)
                f += 1
        rows.append(row)
    return np.array(rows)


def heads_model(branches, sizes, channels=5, reduced=4, pooling="max", neck="relu", flip=False) -> onnx.ModelProto:
    """A graph of nothing but the heads, with the features as an output beside the embeddings."""
    config = ModelConfig(branches=branches, reduced_width=reduced, pooling=pooling, neck=neck)

    def value(name, *shape):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    inputs = [value(f"map_{index}", "n", channels, *size) for index, size in enumerate(sizes)]
    inputs.append(value("heads.weight", config.features, channels, reduced))
    inputs.append(value("heads.bias", config.features, 1, reduced))
    if pooling == "gem":
        inputs.append(value("heads.power", config.features))
    if neck == "relu_norm":
        inputs += [value(name, config.features, 1, reduced) for name in ("heads.scale", "heads.shift")]
    outputs = [value(heads.FEATURES, "n", config.dim), value("embeddings", "images", config.dim)]
    nodes, constants = heads.head_nodes(config, [size[0] for size in sizes], flip)
    graph = helper.make_graph(nodes, "heads", inputs, outputs, constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", heads.OPSET)])
    onnx.checker.check_model(model, full_check=True)
    return model


def feed(maps, weight, bias, **extra):
    numbers = {f"heads.{name}": values for name, values in {"weight": weight, "bias": bias, **extra}.items()}
    return {**{f"map_{index}": map_ for index, map_ in enumerate(maps)}, **numbers}


def run_onnxruntime(model: onnx.ModelProto, *arrays, **extra) -> list[np.ndarray]:
    """Features and embeddings."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed(*arrays, **extra))


@pytest.mark.parametrize(("branches", "sizes"), CASES)
def test_the_definition_is_a_plain_loop(branches, sizes):
    maps, weight, bias = random_case(branches, sizes)
    np.testing.assert_allclose(
        stripe_pool_reduce(maps, branches, weight, bias), plain_loop(maps, branches, weight, bias), atol=1e-9
    )


@pytest.mark.parametrize(("branches", "sizes"), CASES)
@pytest.mark.parametrize(("n", "flip"), [(1, False), (3, False), (6, True)])
def test_the_onnx_heads_are_the_definition(branches, sizes, n, flip):
    maps, weight, bias = random_case(branches, sizes, n)
    expected = stripe_pool_reduce(maps, branches, weight, bias)
    features, embeddings = run_onnxruntime(heads_model(branches, sizes, flip=flip), maps, weight, bias)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(embeddings, embed(expected, flip), atol=1e-6)


@pytest.mark.parametrize(("branches", "sizes"), CASES)
def test_onnxs_own_evaluator_agrees(branches, sizes):
    maps, weight, bias = random_case(branches, sizes)
    found = ReferenceEvaluator(heads_model(branches, sizes)).run(None, feed(maps, weight, bias))[0]
    np.testing.assert_allclose(found, stripe_pool_reduce(maps, branches, weight, bias), atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "avg", "gem"])
@pytest.mark.parametrize("neck", ["relu", "linear", "relu_norm"])
@pytest.mark.parametrize(("branches", "sizes"), CASES)
def test_other_poolings_and_necks_are_a_plain_loop_too(branches, sizes, pooling, neck):
    maps, weight, bias = random_case(branches, sizes)
    choices = random_choices(branches)
    expected = plain_loop(maps, branches, weight, bias, pooling, neck, **choices)
    found = stripe_pool_reduce(maps, branches, weight, bias, pooling=pooling, neck=neck, **choices)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    model = heads_model(branches, sizes, pooling=pooling, neck=neck)
    extra = {"power": choices["powers"]} if pooling == "gem" else {}
    extra |= {name: choices[name] for name in ("scale", "shift") if neck == "relu_norm"}
    np.testing.assert_allclose(run_onnxruntime(model, maps, weight, bias, **extra)[0], expected, atol=2e-5)


def test_a_generalised_mean_needs_its_powers():
    maps, weight, bias = random_case((1, 2), ((4, 2), (5, 2)))
    with pytest.raises(ValueError, match="as many powers"):
        stripe_pool_reduce(maps, (1, 2), weight, bias, pooling="gem")


def test_the_papers_heads_are_these_operators():
    """Bundles of the paper's MGN keep their bytes, whatever else the heads can be."""
    nodes, _ = heads.head_nodes(ModelConfig(branches=(1, 2)), (3, 6), flip=True)
    assert [node.op_type for node in nodes] == [
        *["ReduceMax", "Slice", "ReduceMax", "Slice", "ReduceMax", "Max", *["Unsqueeze"] * 4, "Concat"],
        *["MatMul", "Add", "Relu", "Transpose", "Reshape", "Reshape", "ReduceMean", "ReduceL2", "Max", "Div"],
    ]


def test_maps_of_negative_numbers_keep_their_maxima():
    """A pooling that starts at zero, or pads with it, would give zero."""
    maps, weight, bias = random_case((1, 2), ((4, 2), (5, 2)))
    maps = [-np.abs(map_) - 1 for map_ in maps]
    expected = plain_loop(maps, (1, 2), weight, bias)
    assert (stripe_pool(maps[1], 2)[1] < 0).all()
    np.testing.assert_allclose(
        run_onnxruntime(heads_model((1, 2), ((4, 2), (5, 2))), maps, weight, bias)[0], expected, atol=1e-5
    )


def test_infinite_pixels_stay_infinite():
    maps, weight, bias = random_case((2,), ((4, 2),))
    maps[0][0, 0, 0, 0] = np.inf
    weight = np.abs(weight)
    found = run_onnxruntime(heads_model((2,), ((4, 2),)), maps, weight, bias)[0].reshape(2, 3, 4)
    assert np.isposinf(found[0, :2]).all()  # the whole map and its first stripe
    assert np.isfinite(found[0, 2]).all()
    assert np.isfinite(found[1]).all()


def test_nan_pixels_make_the_definition_nan():
    maps, weight, bias = random_case((2,), ((4, 2),))
    maps[0][0, 0, 0, 0] = np.nan
    found = stripe_pool_reduce(maps, (2,), weight, bias).reshape(2, 3, 4)
    assert np.isnan(found[0, :2]).all()
    assert np.isfinite(found[0, 2]).all()
    assert np.isfinite(found[1]).all()


def test_the_definition_is_the_networks_heads(weights):
    """The maps of the trained-like model through the definition are what PyTorch embeds."""
    model = load_weights(weights)
    pixels = torch.randint(0, 256, (3, 96, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reductions = [reduction[0] for branch in fold_batch_norms(model).branches for reduction in branch.reductions]
    weight = np.stack([conv.weight.detach().numpy()[:, :, 0, 0].T for conv in reductions])
    bias = np.stack([conv.bias.detach().numpy()[None] for conv in reductions])
    for flip in (True, False):
        embedding = Embedding(model, flip)
        with torch.inference_mode():
            maps = [map_.numpy() for map_ in model.feature_maps(embedding.normalise(pixels))]
            expected = embedding(pixels).numpy()
        found = embed(stripe_pool_reduce(maps, model.config.branches, weight, bias), flip)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_embed_averages_each_image_with_its_own_mirror():
    features = np.array([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 9.0]])  # two images, then their mirrors
    np.testing.assert_allclose(embed(features, flip=True), [[1, 0], [0, 1]])
    np.testing.assert_allclose(embed(np.array([[3.0, 4.0]]), flip=False), [[0.6, 0.8]])


def test_a_feature_of_nothing_but_zeros_has_no_direction():
    assert np.array_equal(embed(np.zeros((2, 3)), flip=True), np.zeros((1, 3)))
