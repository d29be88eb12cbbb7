"""The branch heads as one ONNX model-local function, `mgn_deploy::StripePoolReduce`.

Its body is plain ONNX operators, so any runtime runs it; its call is the one place where a fused kernel can take over.
`kernels/reference.py` is the definition that it is tested against.

    map_0 .. map_{B-1}   float32 [n, C, H_b, W_b], one a branch
    weight               float32 [F, C, R], one reduction for each of the F pooled vectors, batch norms folded
    bias                 float32 [F, 1, R]
    features             float32 [n, F * R], in the order of the branches, each branch's global feature first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from mgn_deploy.config import stripe_rows

DOMAIN = "mgn_deploy"
NAME = "StripePoolReduce"
OPSET = 18


def stripe_pool_reduce(branches: Sequence[int], map_heights: Sequence[int]) -> FunctionProto:
    """The function for these numbers of stripes over maps of these heights."""
    nodes: list[NodeProto] = [
        _constant("map_axes", [2, 3]),
        _constant("row_axis", [2]),
        _constant("feature_axis", [0]),
        _constant("flat", [0, -1]),
    ]
    pooled: list[str] = []
    for branch, (stripes, height) in enumerate(zip(branches, map_heights, strict=True)):
        map_name = f"map_{branch}"
        if stripes == 1:
            nodes.append(_node("ReduceMax", [map_name, "map_axes"], f"global_{branch}", keepdims=0))
            pooled.append(f"global_{branch}")
            continue
        maxima = []
        for stripe, (first, last) in enumerate(stripe_rows(height, stripes)):
            rows, maximum = f"rows_{branch}_{stripe}", f"stripe_{branch}_{stripe}"
            nodes += [
                _constant(f"first_{branch}_{stripe}", [first]),
                _constant(f"last_{branch}_{stripe}", [last]),
                _node("Slice", [map_name, f"first_{branch}_{stripe}", f"last_{branch}_{stripe}", "row_axis"], rows),
                _node("ReduceMax", [rows, "map_axes"], maximum, keepdims=0),
            ]
            maxima.append(maximum)
        # The stripes cover every row, so the whole map's maximum is theirs: the map is read once.
        nodes.append(_node("Max", maxima, f"global_{branch}"))
        pooled += [f"global_{branch}", *maxima]
    for name in pooled:
        nodes.append(_node("Unsqueeze", [name, "feature_axis"], f"{name}_row"))
    nodes += [
        _node("Concat", [f"{name}_row" for name in pooled], "pooled", axis=0),  # [F, n, C]
        _node("MatMul", ["pooled", "weight"], "product"),  # [F, n, R]
        _node("Add", ["product", "bias"], "biased"),
        _node("Relu", ["biased"], "reduced"),
        _node("Transpose", ["reduced"], "by_image", perm=[1, 0, 2]),  # [n, F, R]
        _node("Reshape", ["by_image", "flat"], "features"),
    ]
    inputs = [f"map_{branch}" for branch in range(len(branches))] + ["weight", "bias"]
    return helper.make_function(
        DOMAIN, NAME, inputs, ["features"], nodes, opset_imports=[helper.make_opsetid("", OPSET)]
    )


def head_nodes(features: str, dim: int, flip: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    """The mirror average (section 4.1) and the L2 norm: `features` -> `embeddings`, and the constants they need."""
    nodes, constants = [], [numpy_helper.from_array(np.array(1e-12, np.float32), "l2_epsilon")]
    constants.append(numpy_helper.from_array(np.array([1], np.int64), "l2_axes"))
    if flip:
        constants += [
            numpy_helper.from_array(np.array([2, -1, dim], np.int64), "mirror_shape"),
            numpy_helper.from_array(np.array([0], np.int64), "mirror_axes"),
        ]
        nodes += [
            _node("Reshape", [features, "mirror_shape"], "with_mirror"),  # images first, mirrors last
            _node("ReduceMean", ["with_mirror", "mirror_axes"], "averaged", keepdims=0),
        ]
        features = "averaged"
    nodes += [
        _node("ReduceL2", [features, "l2_axes"], "l2", keepdims=1),
        _node("Max", ["l2", "l2_epsilon"], "l2_bounded"),
        _node("Div", [features, "l2_bounded"], "embeddings"),
    ]
    return nodes, constants


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, list(inputs), [output], name=f"heads/{output}", **attributes)


def _constant(name: str, values: list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], name=f"heads/{name}", value_ints=values)
