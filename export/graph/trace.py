"""PyTorch -> one ONNX graph: uint8 `[n, height, width, 3]` RGB in, float32 `[n, dim]` unit rows out.

The trunk (everything up to the branches' last maps) is traced from the model with batch norms folded; the heads, the
mirror average and the L2 norm are composed (`heads.py`). All operators are standard ones, so that any reader of ONNX
takes the graph. The maps are named `map_0`, `map_1`, ... and listed in `metadata_props`, where a GPU engine may cut the
graph (`mgn_deploy/backends/heads/cut.py`). The branches' first convolutions stay `Conv` nodes that read one tensor:
TensorRT runs such convolutions as one.
"""

from __future__ import annotations

import logging
import warnings
from itertools import chain

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from mgn_deploy.backends.heads.cut import FEATURE_MAPS, MIRROR_AVERAGE
from mgn_deploy.config import ModelConfig
from mgn_deploy.export.graph.heads import OPSET, head_nodes
from mgn_deploy.train.model import MGN, Embedding, fold_batch_norms, head_numbers

# What tools of 2024 and later read; opset 18 needs 8.
IR_VERSION = 10


def build_graph(model: MGN, flip: bool = True) -> onnx.ModelProto:
    """The whole network as an ONNX model that passes `onnx.checker`.

    Args:
        model: trained weights; not changed.
        flip: average the features of each image and its mirror, inside the graph.
    """
    config = model.config
    folded = fold_batch_norms(model)
    graph = _trace_trunk(Embedding(folded, flip), config)
    maps = [output.name for output in graph.graph.output]
    heights = [output.type.tensor_type.shape.dim[2].dim_value for output in graph.graph.output]

    nodes, constants = head_nodes(config, heights, flip)
    graph.graph.node.extend(nodes)
    weights = [numpy_helper.from_array(values, name) for name, values in _head_tensors(folded).items()]
    graph.graph.initializer.extend([*weights, *constants])
    del graph.graph.output[:]
    graph.graph.output.append(
        helper.make_tensor_value_info("embeddings", onnx.TensorProto.FLOAT, ["batch", config.dim])
    )
    graph.metadata_props.add(key=FEATURE_MAPS, value=",".join(maps))
    graph.metadata_props.add(key=MIRROR_AVERAGE, value=str(flip).lower())
    graph.ir_version = IR_VERSION
    graph.producer_name, graph.producer_version = "mgn-deploy", ""
    onnx.checker.check_model(graph, full_check=True)
    return graph


class _Trunk(nn.Module):
    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.embedding.model.feature_maps(self.embedding.normalise(images)))


def _trace_trunk(embedding: Embedding, config: ModelConfig) -> onnx.ModelProto:
    images = torch.zeros(2, config.height, config.width, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own internals; what matters is checked on the graph
        program = torch.onnx.export(
            _Trunk(embedding).eval(),
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
            opset_version=OPSET,
            input_names=["images"],
            output_names=[f"map_{branch}" for branch in range(len(config.branches))],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _strip_debug_information(graph)
    return graph


def _head_tensors(folded: MGN) -> dict[str, np.ndarray]:
    """The heads' numbers by their names in the graph, in the shapes that its operators take."""
    numbers = {name: tensor.numpy() for name, tensor in head_numbers(folded).items()}
    tensors = {"heads.weight": numbers["weight"].transpose(0, 2, 1), "heads.bias": numbers["bias"][:, None]}
    if "powers" in numbers:
        tensors["heads.power"] = numbers["powers"]
    if "scale" in numbers:
        tensors |= {f"heads.{name}": numbers[name][:, None] for name in ("scale", "shift")}
    return tensors


def _strip_debug_information(graph: onnx.ModelProto) -> None:
    """The tracer notes file paths and source lines of the machine that it ran on, which would change the graph's
    hash."""
    del graph.graph.value_info[:]
    parts = (graph.graph.node, graph.graph.input, graph.graph.output, graph.graph.initializer)
    for item in (graph, graph.graph, *chain.from_iterable(parts)):
        del item.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
