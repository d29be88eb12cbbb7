"""The branch heads as one ONNX model-local function, `mgn_deploy::StripePoolReduce`.

Its body is plain ONNX operators, so any runtime runs it; its call is the one place where a fused kernel can take over.
`kernels/reference.py` is the definition that it is tested against.

    map_0 .. map_{B-1}   float32 [n, C, H_b, W_b], one a branch
    weight               float32 [F, C, R], one reduction for each of the F pooled vectors, batch norms folded
    bias                 float32 [F, 1, R]
    power                float32 [F], where the pooling is the generalised mean
    scale, shift         float32 [F, 1, R], the norm after the ReLU, where the neck has one
    features             float32 [n, F * R], in the order of the branches, each branch's global feature first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from mgn_deploy.config import GEM_EPSILON, Neck, Pooling, stripe_rows

DOMAIN = "mgn_deploy"
NAME = "StripePoolReduce"
OPSET = 18


def stripe_pool_reduce(
    branches: Sequence[int], map_heights: Sequence[int], pooling: Pooling = "max", neck: Neck = "relu"
) -> FunctionProto:
    """The function for these numbers of stripes over maps of these heights."""
    nodes: list[NodeProto] = [
        _constant("map_axes", [2, 3]),
        _constant("row_axis", [2]),
        _constant("feature_axis", [0]),
        _constant("flat", [0, -1]),
    ]
    if pooling == "gem":
        nodes.append(helper.make_node("Constant", [], ["epsilon"], name="heads/epsilon", value_float=GEM_EPSILON))
    pooled: list[str] = []
    for branch, (stripes, height) in enumerate(zip(branches, map_heights, strict=True)):
        map_name, whole = f"map_{branch}", f"global_{branch}"
        if pooling == "gem":
            nodes.append(_node("Max", [map_name, "epsilon"], f"bounded_{branch}"))
            map_name = f"bounded_{branch}"
        if stripes == 1:
            nodes += _pool(pooling, map_name, whole, len(pooled))
            pooled.append(whole)
            continue
        parts = []
        for stripe, (first, last) in enumerate(stripe_rows(height, stripes)):
            rows, part = f"rows_{branch}_{stripe}", f"stripe_{branch}_{stripe}"
            nodes += [
                _constant(f"first_{branch}_{stripe}", [first]),
                _constant(f"last_{branch}_{stripe}", [last]),
                _node("Slice", [map_name, f"first_{branch}_{stripe}", f"last_{branch}_{stripe}", "row_axis"], rows),
                *_pool(pooling, rows, part, len(pooled) + 1 + stripe),
            ]
            parts.append(part)
        # The stripes cover every row, so the whole map's maximum is theirs: the map is read once. So is its mean where they
        # are equal; a generalised mean has a power of its own.
        if pooling == "max":
            nodes.append(_node("Max", parts, whole))
        elif pooling == "avg" and height % stripes == 0:
            nodes.append(_node("Mean", parts, whole))
        else:
            nodes += _pool(pooling, map_name, whole, len(pooled))
        pooled += [whole, *parts]
    for name in pooled:
        nodes.append(_node("Unsqueeze", [name, "feature_axis"], f"{name}_row"))
    rows_of_all = [f"{name}_row" for name in pooled]
    if pooling == "gem":
        nodes += [
            _node("Concat", rows_of_all, "power_means", axis=0),
            _constant("vector_axes", [1, 2]),
            _node("Reciprocal", ["power"], "roots"),
            _node("Unsqueeze", ["roots", "vector_axes"], "root_of_each"),  # [F, 1, 1]
            _node("Pow", ["power_means", "root_of_each"], "pooled"),
        ]
    else:
        nodes.append(_node("Concat", rows_of_all, "pooled", axis=0))  # [F, n, C]
    nodes.append(_node("MatMul", ["pooled", "weight"], "product"))  # [F, n, R]
    nodes += _neck(neck)
    nodes += [
        _node("Transpose", ["reduced"], "by_image", perm=[1, 0, 2]),  # [n, F, R]
        _node("Reshape", ["by_image", "flat"], "features"),
    ]
    inputs = [f"map_{branch}" for branch in range(len(branches))] + ["weight", "bias"]
    inputs += ["power"] if pooling == "gem" else []
    inputs += ["scale", "shift"] if neck == "relu_norm" else []
    return helper.make_function(
        DOMAIN, NAME, inputs, ["features"], nodes, opset_imports=[helper.make_opsetid("", OPSET)]
    )


def _pool(pooling: Pooling, rows: str, pooled: str, feature: int) -> list[NodeProto]:
    """`rows` `[n, C, h, W]` -> `pooled` `[n, C]`; of the generalised mean all but its root, which all features take at once."""
    if pooling == "max":
        return [_node("ReduceMax", [rows, "map_axes"], pooled, keepdims=0)]
    if pooling == "avg":
        return [_node("ReduceMean", [rows, "map_axes"], pooled, keepdims=0)]
    return [
        _constant(f"feature_{feature}", [feature]),
        _node("Gather", ["power", f"feature_{feature}"], f"power_{feature}", axis=0),  # [1]
        _node("Pow", [rows, f"power_{feature}"], f"{pooled}_powers"),
        _node("ReduceMean", [f"{pooled}_powers", "map_axes"], pooled, keepdims=0),
    ]


def _neck(neck: Neck) -> list[NodeProto]:
    """`product` `[F, n, R]` -> `reduced`."""
    if neck == "linear":
        return [_node("Add", ["product", "bias"], "reduced")]
    biased = _node("Add", ["product", "bias"], "biased")
    if neck == "relu":
        return [biased, _node("Relu", ["biased"], "reduced")]
    return [
        biased,
        _node("Relu", ["biased"], "rectified"),
        _node("Mul", ["rectified", "scale"], "scaled"),
        _node("Add", ["scaled", "shift"], "reduced"),
    ]


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
