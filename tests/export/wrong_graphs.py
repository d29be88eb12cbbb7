"""Ways in which an exporter can be wrong, each as a change of the right graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

Change = Callable[[onnx.ModelProto], None]


def initializer(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [one for one in graph.graph.initializer if one.name == name]
    return found


def set_values(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(values, numpy_helper.to_array(tensor).dtype), tensor.name)
    )


def swap_red_and_blue(graph: onnx.ModelProto) -> None:
    graph.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    for node in graph.graph.node:
        node.input[:] = ["swapped" if name == "images" else name for name in node.input]
    graph.graph.node.insert(0, helper.make_node("Gather", ["images", "bgr"], ["swapped"], axis=3))


def drop_the_mirror(graph: onnx.ModelProto) -> None:
    """The second half of the batch is the images once more, not their mirrors."""
    (flip,) = [node for node in graph.graph.node if node.op_type == "Slice" and not node.name.startswith("heads/")]
    for node in graph.graph.node:
        node.input[:] = [flip.input[0] if name == flip.output[0] else name for name in node.input]
    graph.graph.node.remove(flip)


def move_the_heads_by_one(graph: onnx.ModelProto) -> None:
    for name in ("heads.weight", "heads.bias"):
        tensor = initializer(graph, name)
        set_values(tensor, np.roll(numpy_helper.to_array(tensor), 1, axis=0))


def swap_the_halves_of_the_embedding(graph: onnx.ModelProto) -> None:
    order = np.concatenate([np.arange(64, 128), np.arange(64)])
    graph.graph.initializer.append(numpy_helper.from_array(order, "order"))
    graph.graph.node[-1].output[0] = "unordered"
    graph.graph.node.append(helper.make_node("Gather", ["unordered", "order"], ["embeddings"], axis=1))


def perturb_one_layer(graph: onnx.ModelProto) -> None:
    (tensor,) = [one for one in graph.graph.initializer if one.name.endswith("branches.2.layer4.1.conv2.weight")]
    values = numpy_helper.to_array(tensor)
    set_values(tensor, values + 0.05 * values.std() * np.random.default_rng(0).normal(size=values.shape))


def shift_the_mean_by_two_grey_levels(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, next(one.name for one in graph.graph.initializer if one.name.endswith("mean")))
    set_values(tensor, numpy_helper.to_array(tensor) + 2)


def let_rows_leak(graph: onnx.ModelProto) -> None:
    """A hundredth of the batch's mean in every row: right for a batch of one."""
    norm = next(node for node in graph.graph.node if node.op_type == "ReduceL2")
    features = norm.input[0]
    for node in graph.graph.node:
        node.input[:] = [
            "leaking" if name == features and node.op_type in ("ReduceL2", "Div") else name for name in node.input
        ]
    at = list(graph.graph.node).index(norm)
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0]), "batch_axis"),
            numpy_helper.from_array(np.array(0.01, np.float32), "share"),
        ]
    )
    for node in reversed(
        [
            helper.make_node("ReduceMean", [features, "batch_axis"], ["mean_row"], keepdims=1),
            helper.make_node("Mul", ["mean_row", "share"], ["leak"]),
            helper.make_node("Add", [features, "leak"], ["leaking"]),
        ]
    ):
        graph.graph.node.insert(at, node)


def make_nan(graph: onnx.ModelProto) -> None:
    tensor = initializer(graph, "heads.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[3, 0, 5] = np.nan
    set_values(tensor, values)


def make_nan_in_a_batch_of_one(graph: onnx.ModelProto) -> None:
    """Divides by the batch's size less one, as an unbiased variance over the batch would."""
    output = graph.graph.node[-1]
    output.output[0] = "whole"
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(1, np.float32), "one"),
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
        ]
    )
    graph.graph.node.extend(
        [
            helper.make_node("Shape", ["whole"], ["batch_size"], start=0, end=1),
            helper.make_node("Cast", ["batch_size"], ["batch_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Sub", ["batch_float", "one"], ["others"]),
            helper.make_node("Div", ["zero", "others"], ["nothing"]),
            helper.make_node("Add", ["whole", "nothing"], ["embeddings"]),
        ]
    )


CORRUPTIONS = [
    swap_red_and_blue,
    drop_the_mirror,
    move_the_heads_by_one,
    swap_the_halves_of_the_embedding,
    perturb_one_layer,
    shift_the_mean_by_two_grey_levels,
    let_rows_leak,
]
