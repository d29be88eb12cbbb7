"""The branch heads (section 3.1) as standard ONNX operators: stripe pools, reductions, mirror average, L2.

`tests/emulator/reference.py` defines what they compute; here it is written again because an ONNX graph has to hold it.

    map_0 .. map_{B-1}     float32 [n, C, H_b, W_b], one a branch
    heads.weight           float32 [F, C, R], one reduction for each of the F pooled vectors, batch norms folded
    heads.bias             float32 [F, 1, R]
    heads.power            float32 [F], where the pooling is the generalised mean
    heads.scale, .shift    float32 [F, 1, R], the norm after the ReLU, where the neck has one
    embeddings             float32 [n, F * R] unit rows by branch, each branch's global feature first
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mgn_deploy.config import GEM_EPSILON, ModelConfig, stripe_rows

OPSET = 18
PREFIX = "heads/"  # of the names of all nodes and of all tensors but the maps, the weights and the output
POOLED = f"{PREFIX}pooled"  # [F, n, C]
FEATURES = f"{PREFIX}features"  # [n, F * R]


def head_nodes(
    config: ModelConfig, map_heights: Sequence[int], flip: bool
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Compose the nodes from the maps to `embeddings`, in topological order, and their constants besides the weights.

    Args:
        config: of the model.
        map_heights: rows of each branch's map.
        flip: average the features of each image and its mirror (section 4.1); mirrors follow the images in the batch.
    """
    writer = _Writer(config)
    writer.pool(map_heights)
    writer.reduce()
    writer.finish(flip)
    return writer.nodes, list(writer.constants.values())


class _Writer:
    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def pool(self, map_heights: Sequence[int]) -> None:
        """Maps -> `POOLED`, one row for each whole map and for each stripe."""
        rows: list[str] = []
        for branch, (stripes, height) in enumerate(zip(self.config.branches, map_heights, strict=True)):
            source = f"map_{branch}"
            if self.config.pooling == "gem":
                source = self._node("Max", [source, self._floats("epsilon", GEM_EPSILON)], f"bounded_{branch}")
            rows += self._pool_branch(branch, source, stripes, height, len(rows))
        axis = self._integers("feature_axis", 0)
        rows = [self._node("Unsqueeze", [row, axis], f"{row.removeprefix(PREFIX)}_row") for row in rows]
        if self.config.pooling != "gem":
            self._node("Concat", rows, "pooled", axis=0)
            return
        means = self._node("Concat", rows, "power_means", axis=0)
        roots = self._node("Reciprocal", ["heads.power"], "roots")
        roots = self._node("Unsqueeze", [roots, self._integers("vector_axes", 1, 2)], "root_of_each")  # [F, 1, 1]
        self._node("Pow", [means, roots], "pooled")

    def _pool_branch(self, branch: int, source: str, stripes: int, height: int, first: int) -> list[str]:
        """One branch's pooled vectors `[n, C]`, the whole map's first; `first` is the number of that feature."""
        if stripes == 1:
            return [self._region(source, f"global_{branch}", first)]
        parts = []
        for stripe, (start, end) in enumerate(stripe_rows(height, stripes)):
            name = f"{branch}_{stripe}"
            limits = [self._integers(f"first_{name}", start), self._integers(f"last_{name}", end)]
            rows = self._node("Slice", [source, *limits, self._integers("row_axis", 2)], f"rows_{name}")
            parts.append(self._region(rows, f"stripe_{name}", first + 1 + stripe))
        # The stripes cover every row, so the whole map's maximum is theirs: the map is read once. So is its mean where
        # they are equal; a generalised mean has a power of its own.
        if self.config.pooling == "max":
            whole = self._node("Max", parts, f"global_{branch}")
        elif self.config.pooling == "avg" and height % stripes == 0:
            whole = self._node("Mean", parts, f"global_{branch}")
        else:
            whole = self._region(source, f"global_{branch}", first)
        return [whole, *parts]

    def _region(self, rows: str, name: str, feature: int) -> str:
        """`rows` `[n, C, h, W]` -> `[n, C]`; of the generalised mean all but its root, which all features take at
        once."""
        axes = self._integers("map_axes", 2, 3)
        pooling = self.config.pooling
        if pooling != "gem":
            return self._node("ReduceMax" if pooling == "max" else "ReduceMean", [rows, axes], name, keepdims=0)
        number = self._integers(f"feature_{feature}", feature)
        power = self._node("Gather", ["heads.power", number], f"power_{feature}", axis=0)  # [1]
        return self._node("ReduceMean", [self._node("Pow", [rows, power], f"{name}_powers"), axes], name, keepdims=0)

    def reduce(self) -> None:
        """`POOLED` -> features `[n, F * R]`."""
        reduced = self._node("MatMul", [POOLED, "heads.weight"], "product")  # [F, n, R]
        reduced = self._node("Add", [reduced, "heads.bias"], "biased")
        if self.config.neck != "linear":
            reduced = self._node("Relu", [reduced], "rectified")
        if self.config.neck == "relu_norm":
            reduced = self._node("Mul", [reduced, "heads.scale"], "scaled")
            reduced = self._node("Add", [reduced, "heads.shift"], "shifted")
        by_image = self._node("Transpose", [reduced], "by_image", perm=[1, 0, 2])  # [n, F, R]
        self._node("Reshape", [by_image, self._integers("flat", 0, -1)], "features")

    def finish(self, flip: bool) -> None:
        """Features -> `embeddings`: the mirror average (section 4.1) and the L2 norm."""
        features = FEATURES
        if flip:
            shape, axis = self._integers("mirror_shape", 2, -1, self.config.dim), self._integers("mirror_axis", 0)
            features = self._node("Reshape", [features, shape], "with_mirror")  # images first, mirrors last
            features = self._node("ReduceMean", [features, axis], "averaged", keepdims=0)
        norm = self._node("ReduceL2", [features, self._integers("l2_axis", 1)], "l2", keepdims=1)
        norm = self._node("Max", [norm, self._floats("l2_epsilon", 1e-12)], "l2_bounded")
        self.nodes.append(helper.make_node("Div", [features, norm], ["embeddings"], name=f"{PREFIX}embeddings"))

    def _node(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        name = PREFIX + output
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def _integers(self, name: str, *values: int) -> str:
        return self._constant(name, np.array(values, np.int64))

    def _floats(self, name: str, value: float) -> str:
        return self._constant(name, np.array(value, np.float32))

    def _constant(self, name: str, values: np.ndarray) -> str:
        """An initializer: readers of ONNX differ more about `Constant` nodes."""
        name = PREFIX + name
        self.constants[name] = numpy_helper.from_array(values, name)
        return name
