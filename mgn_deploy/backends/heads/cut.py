"""The graph cut at the feature maps: a trunk graph that ends with them, and the heads' numbers for the kernel.

A bundle's graph names its branches' feature maps in `metadata_props`, and says there whether it averages the mirror.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError

FEATURE_MAPS = "mgn_deploy.feature_maps"
MIRROR_AVERAGE = "mgn_deploy.mirror_average"  # "true" or "false"
HEAD_TENSORS = ("weight", "bias", "scale", "shift", "power")  # initializers heads.NAME; see export/graph/heads.py


def map_names(graph: onnx.ModelProto) -> list[str]:
    """Names of the branches' feature maps, in the order of the branches.

    Raises:
        UserError: the graph does not name them.
    """
    return _metadata(graph, FEATURE_MAPS).split(",")


def cut_heads(graph: onnx.ModelProto, config: ModelConfig) -> tuple[onnx.ModelProto, FusedHeads]:
    """Cut a graph of any precision.

    Args:
        graph: as exported.
        config: of the model; one that `check_heads` passed.

    Returns:
        The trunk, uint8 images -> maps `[n or 2n, C, H_b, W_b]` in the order of the branches and in the type that the
        heads read; and the heads, with weights rounded to that type.
    """
    trunk = cut_trunk(graph)
    found = {tensor.name: tensor for tensor in graph.graph.initializer}
    tensors: dict[str, np.ndarray | None] = {}
    for name in HEAD_TENSORS:
        tensor = found.get(f"heads.{name}")
        tensors[name] = None if tensor is None else numpy_helper.to_array(tensor)
    kind = helper.tensor_dtype_to_np_dtype(trunk.graph.output[0].type.tensor_type.elem_type)
    weight = np.ascontiguousarray(_present(tensors["weight"]).transpose(0, 2, 1))
    heads = FusedHeads(
        config,
        _metadata(graph, MIRROR_AVERAGE) == "true",
        weight.astype(kind).astype(np.float32),
        _vectors(_present(tensors["bias"])),
        None if tensors["scale"] is None else _vectors(tensors["scale"]),
        None if tensors["shift"] is None else _vectors(tensors["shift"]),
        tensors["power"],
    )
    return trunk, heads


def check_heads(config: ModelConfig, flip: bool, max_batch: int) -> None:
    """Refuse heads that the kernel does not take, and more images a call than it takes.

    Raises:
        UserError: too many branches, an odd reduced width, or `max_batch` above the kernel's limit.
    """
    from mgn_deploy.kernels.plan import MAX_BATCH, MAX_BRANCHES

    limit = MAX_BATCH // (2 if flip else 1)
    if config.reduced_width % 16 or len(config.branches) > MAX_BRANCHES:
        raise UserError(
            f"fused heads take at most {MAX_BRANCHES} branches and a reduced width divisible by 16; this model has "
            f"{len(config.branches)} and {config.reduced_width}: leave out --fused-heads"
        )
    if max_batch > limit:
        raise UserError(f"a batch of {max_batch}: fused heads take at most {limit} images a call; lower --batch")


def cut_trunk(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Keep what the maps depend on, and make them the outputs: uint8 images -> maps `[n or 2n, C, H_b, W_b]`."""
    names = map_names(graph)
    producers = {output: node for node in graph.graph.node for output in node.output}
    wanted, waiting = set(), list(names)
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.name not in wanted:
            wanted.add(node.name)
            waiting.extend(node.input)
    trunk = onnx.ModelProto()
    trunk.CopyFrom(graph)
    kept = [node for node in graph.graph.node if node.name in wanted]
    read = {name for node in kept for name in node.input}
    for field, items in (
        ("node", kept),
        ("initializer", [tensor for tensor in graph.graph.initializer if tensor.name in read]),
        ("output", []),
    ):
        target: Any = getattr(trunk.graph, field)
        del target[:]
        target.extend(items)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(trunk).graph.value_info}
    trunk.graph.output.extend(known[name] for name in names)
    onnx.checker.check_model(trunk, full_check=True)
    return trunk


def channels_last(trunk: onnx.ModelProto) -> onnx.ModelProto:
    """Let a trunk's maps be `[n, H_b, W_b, C]`, under the same names. An engine that computes channels last and would
    transpose them back for the graph's sake takes both transpositions out, and the kernel reads what it wrote."""
    turned = onnx.ModelProto()
    turned.CopyFrom(trunk)
    for output in turned.graph.output:
        name = f"{output.name}_channels_first"
        for node in turned.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if one == output.name else one for one in names]
        turned.graph.node.append(helper.make_node("Transpose", [name], [output.name], name, perm=[0, 2, 3, 1]))
        dims = list(output.type.tensor_type.shape.dim)
        del output.type.tensor_type.shape.dim[:]
        output.type.tensor_type.shape.dim.extend(dims[axis] for axis in (0, 2, 3, 1))
    del turned.graph.value_info[:]
    onnx.checker.check_model(turned, full_check=True)
    return turned


def is_half(graph: onnx.ModelProto) -> bool:
    """Whether its convolutions are of float16, by the type of the most numbers that it holds."""
    numbers = dict.fromkeys((onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16), 0)
    for tensor in graph.graph.initializer:
        if tensor.data_type in numbers:
            numbers[tensor.data_type] += int(np.prod(tensor.dims))
    return numbers[onnx.TensorProto.FLOAT16] > numbers[onnx.TensorProto.FLOAT]


def _metadata(graph: onnx.ModelProto, key: str) -> str:
    for entry in graph.metadata_props:
        if entry.key == key:
            return entry.value
    raise UserError(f"the graph has no {key} among its metadata: export it with mgn-deploy")


def _present(tensor: np.ndarray | None) -> np.ndarray:
    if tensor is None:
        raise UserError("the graph has no heads.weight or heads.bias: export it with mgn-deploy")
    return tensor


def _vectors(tensor: np.ndarray) -> np.ndarray:
    """`[F, 1, R]` -> `[F, R]`."""
    return tensor.reshape(len(tensor), -1)
