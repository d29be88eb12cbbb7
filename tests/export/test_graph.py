"""The ONNX graph: what it takes, what it holds, and that it is PyTorch's network."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.config import ModelConfig
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.train.model import Embedding
from mgn_deploy.train.weights import load_weights, new_model

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


@pytest.fixture(scope="module")
def graph(bundle_folder) -> onnx.ModelProto:
    return onnx.load(bundle_folder / "graph.onnx")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 96, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def expected(weights, pixels) -> np.ndarray:
    with torch.inference_mode():
        return Embedding(load_weights(weights))(torch.from_numpy(pixels)).numpy()


def run_onnxruntime(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["embeddings"], {"images": pixels})[0]


def run_openvino(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    core = openvino_core()
    inlined = onnx.inliner.inline_local_functions(model)
    compiled = core.compile_model(
        core.read_model(inlined.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return np.array(compiled([pixels])[0])


def consumers(graph: onnx.ModelProto, tensor: str) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if tensor in node.input]


def test_the_checker_finds_nothing(graph):
    onnx.checker.check_model(graph, full_check=True)


def test_images_in_are_uint8_pixels_last(graph):
    (images,) = graph.graph.input
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert (images.name, images.type.tensor_type.elem_type, shape) == (
        "images",
        onnx.TensorProto.UINT8,
        ["batch", 96, 32, 3],
    )


def test_embeddings_out_are_float32_rows(graph):
    (embeddings,) = graph.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in embeddings.type.tensor_type.shape.dim]
    assert (embeddings.name, embeddings.type.tensor_type.elem_type, shape) == (
        "embeddings",
        onnx.TensorProto.FLOAT,
        ["batch", 8 * 16],
    )


def test_pools_and_reductions_are_among_the_heads_alone(graph):
    pools = [node.name for node in graph.graph.node if node.op_type in ("ReduceMax", "MatMul")]
    assert len(pools) == 1 + 2 + 3 + 1  # a stripe each, and one product for all reductions
    assert all(name.startswith("heads/") for name in pools)
    assert [node.op_type for node in graph.graph.node].count("MaxPool") == 1  # the stem's


def test_no_batch_norm_is_left(graph):
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}


def test_every_convolution_has_a_bias_and_there_is_none_too_many(graph, weights):
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    model = load_weights(weights)
    in_trunk_and_branches = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "reductions" not in name
    ]
    assert len(convolutions) == len(in_trunk_and_branches)
    assert all(len(node.input) == 3 for node in convolutions)


def test_the_three_branches_first_convolutions_read_one_tensor(graph):
    readers = {}
    for node in graph.graph.node:
        if node.op_type == "Conv":
            readers.setdefault(node.input[0], []).append(node.name)
    assert sorted(len(names) for names in readers.values())[-1] == 3
    (shared,) = [tensor for tensor, names in readers.items() if len(names) == 3]
    # Three first convolutions and the three identities of the residual blocks that they begin.
    assert sorted(node.op_type for node in consumers(graph, shared)) == ["Add"] * 3 + ["Conv"] * 3


@pytest.mark.parametrize("run", [run_onnxruntime, run_openvino])
@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_any_batch_size_is_pytorchs_embedding(graph, pixels, expected, run, batch):
    found = run(graph, pixels[:batch])
    assert found.dtype == np.float32
    assert np.abs(found - expected[:batch]).max() < 1e-5


@pytest.mark.parametrize(
    ("branches", "size", "flip"),
    [((1,), (96, 32), True), ((2, 4), (96, 32), False), ((1, 2, 3), (112, 48), True)],
    ids=["global only", "no global, no mirror", "rows that do not divide"],
)
def test_other_models_are_pytorchs_too(branches, size, flip):
    config = ModelConfig(
        backbone="resnet18", base_width=8, reduced_width=4, branches=branches, height=size[0], width=size[1]
    )
    model = new_model(config, seed=2)
    graph = build_graph(model, flip)
    pixels = np.random.default_rng(1).integers(0, 256, (3, *size, 3), np.uint8)
    with torch.inference_mode():
        expected = Embedding(model, flip)(torch.from_numpy(pixels)).numpy()
    assert np.abs(run_onnxruntime(graph, pixels) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "choices",
    [
        {"ibn": "a", "stem_pool": "ceil", "global_stride": 1, "pooling": "gem", "neck": "linear"},
        {"ibn": "a", "global_stride": 1, "pooling": "gem", "neck": "relu_norm"},
        {"pooling": "avg"},
    ],
    ids=["fast-reid", "fast-reid of 2020", "seathiefwang"],
)
def test_models_of_public_checkpoints_are_pytorchs_on_both_engines(choices):
    config = ModelConfig(backbone="resnet18", base_width=8, reduced_width=4, height=96, width=32, **choices)
    model = new_model(config, seed=2)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.InstanceNorm2d)):
            module.weight.data.uniform_(-1.3, 1.3, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    for branch in model.branches:
        if config.pooling == "gem":
            branch.powers.data.uniform_(1.5, 4.5, generator=generator)
    graph = build_graph(model)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 96, 32, 3), np.uint8)
    with torch.inference_mode():
        expected = Embedding(model)(torch.from_numpy(pixels)).numpy()
    assert np.abs(run_onnxruntime(graph, pixels) - expected).max() < 1e-5
    assert np.abs(run_openvino(graph, pixels) - expected).max() < 1e-5
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("InstanceNormalization") == (2 + 2 + 1 + 3 if config.ibn == "a" else 0)


@pytest.mark.slow
def test_another_process_builds_the_same_bytes(weights, bundle_folder):
    program = (
        "import sys, hashlib\n"
        "from mgn_deploy.export.graph.trace import build_graph\n"
        "from mgn_deploy.train.weights import load_weights\n"
        "print(hashlib.sha256(build_graph(load_weights(sys.argv[1])).SerializeToString(deterministic=True)).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, weights],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=True,
    )
    assert done.stdout.split()[-1] == hashlib.sha256((bundle_folder / "graph.onnx").read_bytes()).hexdigest()


def test_the_bytes_tell_nothing_of_this_machine(graph, weights):
    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    for initializer in bare.graph.initializer:
        initializer.ClearField("raw_data")  # whose bytes may spell anything
    content = bare.SerializeToString()
    for word in (
        str(Path.home()),
        os.getcwd(),
        sys.prefix,
        str(weights.parent),
        f"/{getpass.getuser()}/",
        ".py",
        "site-packages",
        "/tmp/",
    ):
        assert word.encode() not in content, word
    assert not re.search(rb"\b" + re.escape(platform.node().encode()) + rb"\b", content)


def test_the_weights_are_inside_in_float32(graph):
    kinds = {
        numpy_helper.to_array(one).dtype for one in graph.graph.initializer if numpy_helper.to_array(one).size > 16
    }
    assert kinds == {np.dtype(np.float32)}
    assert not [one.name for one in graph.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]


def test_opset_and_ir_are_what_tools_of_2024_read(graph):
    assert {one.domain: one.version for one in graph.opset_import} == {"": 18}
    assert graph.ir_version == 10


def test_images_are_the_only_input_and_initializers_are_all_used(graph):
    used = {name for node in graph.graph.node for name in node.input}
    assert {one.name for one in graph.graph.initializer} <= used
    made = (
        {name for node in graph.graph.node for name in node.output}
        | {one.name for one in graph.graph.initializer}
        | {"images", ""}
    )
    assert used <= made
