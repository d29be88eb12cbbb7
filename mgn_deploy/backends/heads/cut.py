"""The graph cut at the feature maps: a trunk graph that ends with them, and the heads' numbers for the kernel.

A bundle's graph names its branches' feature maps in `metadata_props`, and says there whether it averages the mirror.
Its heads' numbers are initializers `heads.NAME`: see `export/graph/heads.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError

FEATURE_MAPS = "mgn_deploy.feature_maps"
MIRROR_AVERAGE = "mgn_deploy.mirror_average"  # "true" or "false"


@dataclass(frozen=True)
class FusedHeads:
    """The heads' numbers, all float32; weights are rounded to the type of the maps that they go with.

    `weight` is `[F, R, C]`, `bias` `[F, R]`, and so are `scale` and `shift` (neck "relu_norm", else None); `power` is
    `[F]` (pooling "gem", else None). With `flip` the mirrors follow the images in a batch of maps.
    """

    config: ModelConfig
    flip: bool
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    power: np.ndarray | None


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
    own = {
        tensor.name.removeprefix("heads."): numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if tensor.name.startswith("heads.")
    }
    if "weight" not in own or "bias" not in own:
        raise UserError("the graph has no heads.weight or heads.bias: export it with mgn-deploy")
    kind = helper.tensor_dtype_to_np_dtype(trunk.graph.output[0].type.tensor_type.elem_type)
    weight = np.ascontiguousarray(own["weight"].transpose(0, 2, 1)).astype(kind).astype(np.float32)
    scale, shift = (own[name].squeeze(1) if name in own else None for name in ("scale", "shift"))
    flip = _metadata(graph, MIRROR_AVERAGE) == "true"
    return trunk, FusedHeads(config, flip, weight, own["bias"].squeeze(1), scale, shift, own.get("power"))


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
    # Not onnx.utils.Extractor: onnx 1.16's calls itself once for each node of the longest path.
    wanted, kept = set(names), []
    for node in reversed(graph.graph.node):  # which are in topological order
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    weights = [tensor for tensor in graph.graph.initializer if tensor.name in wanted]
    maps = [known[name] for name in names]
    body = helper.make_graph(kept[::-1], graph.graph.name, graph.graph.input, maps, weights)
    trunk = helper.make_model(body, ir_version=graph.ir_version, opset_imports=graph.opset_import)
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
    numbers = Counter[int]()
    for tensor in graph.graph.initializer:
        numbers[tensor.data_type] += int(np.prod(tensor.dims))
    return numbers[onnx.TensorProto.FLOAT16] > numbers[onnx.TensorProto.FLOAT]


def _metadata(graph: onnx.ModelProto, key: str) -> str:
    for entry in graph.metadata_props:
        if entry.key == key:
            return entry.value
    raise UserError(f"the graph has no {key} among its metadata: export it with mgn-deploy")
