"""The layers of a built TensorRT plan as JSON: what was fused into what, and in which type it computes.

With a GPU, TensorRT's engine inspector tells. Without one no plan can be opened; there the builder's own log ends with
the same table in text:

    Layers:
    Name: conv1, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,3,8,8], Datatype: Half, ... }], ...
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

Layer = dict[str, Any]

_TENSOR_KEY = re.compile(r"(?:^|, )(Name|Dimensions|Strides|StrideOrder|Datatype|Format): ")
_LAYER_KEY = re.compile(r"(?:^|, )(Name|LayerType|Inputs|Constants|Outputs|TacticName|StreamId|Metadata|[A-Z]\w+): ")


def layers_from_log(text: str) -> list[Layer]:
    """The table of a builder's log: a dict a layer, tensors as dicts with Name, Dimensions, Datatype and Format."""
    return [_layer(line) for line in text.splitlines() if line.startswith("Name: ")]


def layers_from_inspector(text: str) -> list[Layer]:
    """The table of `IEngineInspector.get_engine_information(JSON)`, in the same form."""
    layers = json.loads(text).get("Layers", [])
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


def data_type(tensor: Mapping[str, Any]) -> str:
    """As in "Half"; TensorRT 10's inspector has it in one word with the format."""
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))


def fused_nodes(layer: Layer) -> list[str]:
    """Names of the ONNX nodes that became this layer."""
    return re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))


def node_types(layers: Sequence[Layer], nodes: Sequence[str]) -> dict[str, str]:
    """By ONNX node, the type of what the layer that computes it reads, as in "Int8". Nodes that no layer names are left
    out.

    A layer that only brings data into shape for a node can name it, too: it is taken where there is no other.
    """
    types: dict[str, str] = {}
    for layer in sorted(layers, key=lambda layer: layer.get("LayerType") != "kgen"):
        for node in fused_nodes(layer):
            if node in nodes and layer.get("Inputs"):
                types[node] = data_type(layer["Inputs"][0])
    return types


def fused_with(layers: Sequence[Layer], nodes: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of `nodes` that run in one layer with one of `others`.

    A generated kernel ("kgen") runs pointwise operators only: one that scales what a convolution wrote, or adds its
    bias, names the convolution all the same, and does not count.
    """
    together = [set(fused_nodes(layer)) for layer in layers if layer.get("LayerType") != "kgen"]
    return [node for node in nodes if any(node in names and names & set(others) for names in together)]


def summary(layers: Sequence[Layer], graph: onnx.ModelProto) -> dict[str, Any]:
    """What to look at first: in which types the convolutions run, and how many residual additions run inside one."""
    convolutions = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    constants = {tensor.name for tensor in graph.graph.initializer}
    additions = [node.name for node in graph.graph.node if node.op_type == "Add" and not constants & {*node.input}]
    return {
        "layers": len(layers),
        "convolutions": dict(Counter(node_types(layers, convolutions).values())),
        "additions": len(additions),
        "additions_in_convolutions": len(fused_with(layers, additions, convolutions)),
    }


def _layer(line: str) -> Layer:
    """One line. Keys are those at bracket depth 0."""
    layer: Layer = {}
    for key, value in _pairs(line, _LAYER_KEY):
        layer[key] = _tensors(value) if key in ("Inputs", "Constants", "Outputs") else value
    return layer


def _tensors(text: str) -> list[dict[str, Any]]:
    tensors = []
    for inner in _braced(text):
        tensor: dict[str, Any] = dict(_pairs(inner.strip(), _TENSOR_KEY))
        for key in ("Dimensions", "Strides", "StrideOrder"):
            if re.fullmatch(r"\[[-\d,\s]*\]", tensor.get(key, "")):
                tensor[key] = json.loads(tensor[key])
        tensors.append(tensor)
    return tensors


def _pairs(text: str, key: re.Pattern[str]) -> list[tuple[str, str]]:
    depths = _depths(text)
    starts = [match for match in key.finditer(text) if depths[match.start(1)] == 0]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [(match.group(1), text[match.end() : end].strip()) for match, end in zip(starts, ends, strict=True)]


def _braced(text: str) -> list[str]:
    depths = _depths(text, "{", "}")
    opened = [at for at, char in enumerate(text) if char == "{" and depths[at] == 0]
    return [text[at + 1 : text.index("}", at)] for at in opened]


def _depths(text: str, opening: str = "[{(", closing: str = "]})") -> list[int]:
    """Before each character, how many brackets are open."""
    depths, depth = [], 0
    for char in text:
        depths.append(depth)
        depth += (char in opening) - (char in closing)
    return depths
