"""The graph cut at the heads' call: a trunk graph that ends with the maps, and the heads' numbers for the kernel."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.export.graph.rewrite import head_call, map_names, with_nodes
from mgn_deploy.kernels.plan import MAX_BATCH, MAX_BRANCHES


def cut_heads(graph: onnx.ModelProto, config: ModelConfig, flip: bool) -> tuple[onnx.ModelProto, FusedHeads]:
    """Of a graph of any precision: uint8 images -> maps `[n or 2n, C, H_b, W_b]`, in the order of the
    branches and the type that the heads read; and the heads. The config is one that `check_heads` passed.
    """
    call = head_call(graph)
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer if t.name in call.input}
    numbers = {name.removeprefix("heads."): values for name, values in tensors.items()}
    weight = np.ascontiguousarray(numbers.pop("weight").transpose(0, 2, 1))
    trunk = _trunk(graph, call)
    kind = helper.tensor_dtype_to_np_dtype(trunk.graph.output[0].type.tensor_type.elem_type)
    vectors = {name: values.reshape(len(values), -1) for name, values in numbers.items() if name != "power"}
    heads = FusedHeads(
        config,
        flip,
        weight.astype(kind).astype(np.float32),
        vectors["bias"],
        vectors.get("scale"),
        vectors.get("shift"),
        numbers.get("power"),
    )
    return trunk, heads


def check_heads(config: ModelConfig, flip: bool, most: int) -> None:
    """Raise UserError unless the kernel takes this model's heads, and `most` images a call."""
    limit = MAX_BATCH // (2 if flip else 1)
    if config.reduced_width % 16 or len(config.branches) > MAX_BRANCHES:
        raise UserError(
            f"--heads fused takes at most {MAX_BRANCHES} branches and a reduced width divisible by 16; this model has "
            f"{len(config.branches)} and {config.reduced_width}: use --heads plain"
        )
    if most > limit:
        raise UserError(f"a batch of {most}: fused heads take at most {limit} images a call; lower --batch")


def _trunk(graph: onnx.ModelProto, call: onnx.NodeProto) -> onnx.ModelProto:
    before = list(graph.graph.node)[: list(graph.graph.node).index(call)]
    trunk = with_nodes(graph, before, graph.graph.initializer)
    del trunk.functions[:]
    del trunk.graph.output[:]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(trunk).graph.value_info}
    trunk.graph.output.extend(known[name] for name in map_names(graph))
    onnx.checker.check_model(trunk, full_check=True)
    return trunk
