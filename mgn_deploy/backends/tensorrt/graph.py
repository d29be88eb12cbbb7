"""An ONNX graph as TensorRT's parser takes it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from mgn_deploy.errors import UserError


@dataclass(frozen=True)
class PreparedGraph:
    """The bytes for the parser, and the image input's name, height and width."""

    content: bytes
    input_name: str
    height: int
    width: int


def prepare(graph: onnx.ModelProto) -> PreparedGraph:
    """Cast the pixels of a copy before anything else reads them.

    TensorRT takes uint8 only as the input of a cast; every other operator refuses it. The values are the same.

    Raises:
        UserError: the graph has no uint8 input `[n, height, width, 3]`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    images = _image_input(copy.graph)
    height, width = (dim.dim_value for dim in images.type.tensor_type.shape.dim[1:3])
    pixels = f"{images.name}/float"
    for node in copy.graph.node:
        node.input[:] = [pixels if name == images.name else name for name in node.input]
    cast = helper.make_node("Cast", [images.name], [pixels], name=pixels, to=TensorProto.FLOAT)
    copy.graph.node.insert(0, cast)
    return PreparedGraph(copy.SerializeToString(), images.name, height, width)


def _image_input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    for value in graph.input:
        tensor = value.type.tensor_type
        sides = [dim.dim_value for dim in tensor.shape.dim]
        if tensor.elem_type == TensorProto.UINT8 and len(sides) == 4 and sides[1] and sides[2] and sides[3] == 3:
            return value
    raise UserError(
        f"the graph's inputs are {', '.join(value.name for value in graph.input) or 'none'}, and not uint8 images "
        "[n, height, width, 3]: export it with mgn-deploy"
    )
