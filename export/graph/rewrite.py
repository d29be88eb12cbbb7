"""Reading and rewriting of the graphs that `build_graph` makes: which nodes are the network, and what feeds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from mgn_deploy.backends.heads.cut import map_names


def trunk_nodes(graph: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The network's nodes in topological order: from the first convolution to the nodes that make the maps."""
    missing = set(map_names(graph))
    started = False
    for node in graph.graph.node:
        started = started or node.op_type == "Conv"
        if started:
            yield node
        missing -= {*node.output}
        if not missing:
            return


def pixels_name(graph: onnx.ModelProto) -> str:
    """What the first convolution reads: normalised images and, with the mirror average, their mirrors."""
    return next(node for node in graph.graph.node if node.op_type == "Conv").input[0]


class GraphWriter:
    """Makes a copy of a graph with other `nodes` instead of its own, and with those of the constants that they read."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []

    def values(self, name: str) -> np.ndarray:
        """What a constant holds."""
        return numpy_helper.to_array(self._constants[name])

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant, and return its name."""
        self._constants[name] = numpy_helper.from_array(values, name)
        return name

    def result(self) -> onnx.ModelProto:
        """The copy."""
        result = onnx.ModelProto()
        result.CopyFrom(self._graph)
        del result.graph.node[:]
        result.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        del result.graph.initializer[:]
        result.graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in used)
        return result


def group_of(weight_name: str) -> str:
    """The residual block or other unit that a convolution's weight belongs to, as in `trunk.4.0` or
    `branches.1.layer4.2`."""
    parts = weight_name.removeprefix("embedding.model.").split(".")
    if parts[0] == "trunk":
        return ".".join(parts[: 3 if parts[1] in ("4", "5") else 2])
    return ".".join(parts[:4])
