"""Float32 graph -> float16 or bfloat16 graph, with casts in the graph: TensorRT 11 knows no precision flag.

In half precision: the convolutions with their ReLUs, additions and pools, and so the maps. In float32: the pixels'
normalisation, instance norms, Q/DQ pairs, the heads from the pooled vectors on (from the maps on where they are
averaged), the mirror average and the L2 norm, every node whose values would overflow, and all maps where one of them
would: fused heads take maps of one type.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.shape_inference
from onnx import TensorProto, helper, numpy_helper

from mgn_deploy.backends.heads.cut import map_names
from mgn_deploy.export.graph.heads import PREFIX
from mgn_deploy.export.graph.rewrite import GraphWriter, trunk_nodes
from mgn_deploy.export.precision.ranges import TensorRange

LARGEST_FLOAT16 = 65504.0
# Other images may reach further than those that were looked at.
MARGIN = 4.0
LIMIT = LARGEST_FLOAT16 / MARGIN
# INT8 scales are too small for float16: a weight's is its largest magnitude by 127.
FLOAT32_OPERATORS = ("InstanceNormalization", "QuantizeLinear", "DequantizeLinear")
# Convolutions and pools take bfloat16 from this operator set on.
BFLOAT16_OPSET = 22
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def to_half(graph: onnx.ModelProto, precision: str, ranges: Mapping[str, TensorRange]) -> onnx.ModelProto:
    """A copy of the graph in half precision; nodes that would overflow stay in float32 (`float32_nodes`).

    Args:
        graph: float32, as `build_graph` or `quantise` makes it.
        precision: "fp16" or "bf16"; bfloat16 reaches as far as float32 and overflows nowhere.
        ranges: of the graph's activations on real images (`measure_ranges`).
    """
    overflowing = [] if precision == "bf16" else overflowing_nodes(graph, ranges)
    half_maps = precision == "bf16" or not _too_large(ranges) & {*map_names(graph)}
    rewriter = _Rewriter(graph, TYPES[precision])
    zone = {node.name for node in trunk_nodes(graph)}
    # Maxima are exact in half precision, sums are not.
    pooled_in_half = half_maps and any(node.op_type == "ReduceMax" for node in graph.graph.node)
    for node in graph.graph.node:
        if node.name in zone:
            float32 = node.name in overflowing or node.op_type in FLOAT32_OPERATORS
            rewriter.add(node, TensorProto.FLOAT if float32 else TYPES[precision])
            for name in {*node.output} & {*map_names(graph)} if not half_maps and not float32 else ():
                rewriter.widen(name)
        elif node.name.startswith(PREFIX):
            pooled_in_half = pooled_in_half and node.op_type != "MatMul"
            rewriter.add(node, TYPES[precision] if pooled_in_half else TensorProto.FLOAT)
        else:
            rewriter.nodes.append(node)
    result = rewriter.result()
    if precision == "bf16":
        for imported in result.opset_import:
            imported.version = BFLOAT16_OPSET
    onnx.checker.check_model(result, full_check=True)
    return result


def overflowing_nodes(graph: onnx.ModelProto, ranges: Mapping[str, TensorRange]) -> list[str]:
    """Nodes that read or write what float16 cannot hold with a margin."""
    too_large = _too_large(ranges)
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > LIMIT:
            too_large.add(tensor.name)
    return [node.name for node in trunk_nodes(graph) if too_large & {*node.input, *node.output}]


def float32_nodes(graph: onnx.ModelProto) -> list[str]:
    """Names of the nodes that a graph by `to_half` has in float32 because they would overflow; none of a graph without
    half precision."""
    known = onnx.shape_inference.infer_shapes(graph).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    either = [node for node in trunk_nodes(graph) if node.op_type not in (*FLOAT32_OPERATORS, "Cast")]
    kept = [node.name for node in either if types[node.output[0]] == TensorProto.FLOAT]
    return kept if len(kept) < len(either) else []


def _too_large(ranges: Mapping[str, TensorRange]) -> set[str]:
    return {name for name, one in ranges.items() if one.largest > LIMIT}


class _Rewriter(GraphWriter):
    """Collects nodes whose float inputs are cast to a wanted type; each tensor is cast once, constants are
    converted."""

    def __init__(self, graph: onnx.ModelProto, half: int) -> None:
        super().__init__(graph)
        self._half = half
        self._types = {
            name: TensorProto.FLOAT for name, tensor in self._constants.items() if tensor.data_type == TensorProto.FLOAT
        }

    def add(self, node: onnx.NodeProto, wanted: int) -> None:
        """Append the node with its float inputs in the wanted type; its outputs are of that type."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(node.input):
            integer = name in self._constants and name not in self._types
            if name and not integer:
                copy.input[index] = self._in_type(name, wanted)
        self._types.update(dict.fromkeys(node.output, wanted))
        self.nodes.append(copy)

    def widen(self, name: str) -> None:
        """Make the last node's output float32 under its own name."""
        half = f"{name}/half"
        self.nodes[-1].output[:] = [half if output == name else output for output in self.nodes[-1].output]
        self.nodes.append(helper.make_node("Cast", [half], [name], name=f"cast/{name}", to=TensorProto.FLOAT))
        self._types.update({half: self._half, name: TensorProto.FLOAT})

    def _in_type(self, name: str, wanted: int) -> str:
        if self._types.get(name, TensorProto.FLOAT) == wanted:
            return name
        other = f"{name}/{TensorProto.DataType.Name(wanted).lower()}"
        if other not in self._types:
            self._types[other] = wanted
            if name in self._constants:
                kind = helper.tensor_dtype_to_np_dtype(wanted)  # ml_dtypes' for bfloat16
                self.constant(other, self.values(name).astype(kind))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [other], name=f"cast/{other}", to=wanted))
        return other
