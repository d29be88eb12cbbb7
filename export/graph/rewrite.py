"""Reading and rewriting of the graphs that `build_graph` makes: which nodes are the network, and what feeds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx

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


def tensor_names_between(graph: onnx.ModelProto) -> list[str]:
    """Every activation from the first convolution's input to the maps."""
    return [pixels_name(graph), *(output for node in trunk_nodes(graph) for output in node.output)]


def with_nodes(
    graph: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A copy of the graph with these nodes instead of its own, and with those of the constants that they read."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensor for tensor in constants if tensor.name in used)
    return result


def group_of(weight_name: str) -> str:
    """The residual block or other unit that a convolution's weight belongs to, as in `trunk.4.0` or
    `branches.1.layer4.2`."""
    parts = weight_name.removeprefix("embedding.model.").split(".")
    if parts[0] == "trunk":
        return ".".join(parts[: 3 if parts[1] in ("4", "5") else 2])
    return ".".join(parts[:4])
