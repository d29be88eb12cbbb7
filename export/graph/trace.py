"""PyTorch -> one ONNX graph: uint8 `[n, height, width, 3]` RGB in, float32 `[n, dim]` unit rows out.

The trunk (everything up to the branches' last maps) is traced from the model with batch norms folded. The heads are a
call of the model-local function `mgn_deploy::StripePoolReduce`, the mirror average and the L2 norm are plain operators.
The three branches' first convolutions stay three `Conv` nodes that read one tensor: TensorRT runs such as one.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from mgn_deploy.config import ModelConfig
from mgn_deploy.export.graph import heads
from mgn_deploy.train.model import MGN, Embedding, fold_batch_norms

# IR version 10 is what opset 18 tools of 2024 and later read; model-local functions need 8.
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
    heights = [_static_dims(output)[2] for output in graph.graph.output]
    maps = [output.name for output in graph.graph.output]

    tensors = _head_tensors(folded)
    nodes, constants = heads.head_nodes("features", config.dim, flip)
    call = helper.make_node(
        heads.NAME,
        [*maps, *tensors],
        ["features"],
        domain=heads.DOMAIN,
        name="heads/StripePoolReduce",
    )
    graph.graph.node.extend([call, *nodes])
    graph.graph.initializer.extend(
        [*(numpy_helper.from_array(array, name) for name, array in tensors.items()), *constants]
    )
    del graph.graph.output[:]
    graph.graph.output.append(
        helper.make_tensor_value_info("embeddings", onnx.TensorProto.FLOAT, ["batch", config.dim])
    )
    graph.functions.append(heads.stripe_pool_reduce(config.branches, heights, config.pooling, config.neck))
    graph.opset_import.append(helper.make_opsetid(heads.DOMAIN, 1))
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
            opset_version=heads.OPSET,
            input_names=["images"],
            output_names=[f"map_{branch}" for branch in range(len(config.branches))],
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    _strip_debug_information(graph)
    return graph


def _head_tensors(folded: MGN) -> dict[str, np.ndarray]:
    """What the heads' function takes beside the maps, in its order; the reductions of all branches stacked."""
    reductions = [reduction for branch in folded.branches for reduction in branch.reductions]
    tensors = {
        "heads.weight": torch.stack([reduction[0].weight.flatten(1).T for reduction in reductions]),
        "heads.bias": torch.stack([reduction[0].bias[None] for reduction in reductions]),
    }
    if folded.config.pooling == "gem":
        tensors["heads.power"] = torch.cat([branch.powers for branch in folded.branches])
    if folded.config.neck == "relu_norm":
        norms = [reduction[3] for reduction in reductions]
        scales = [norm.weight / torch.sqrt(norm.running_var + norm.eps) for norm in norms]
        shifts = [norm.bias - norm.running_mean * scale for norm, scale in zip(norms, scales, strict=True)]
        tensors["heads.scale"] = torch.stack([scale[None] for scale in scales])
        tensors["heads.shift"] = torch.stack([shift[None] for shift in shifts])
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def _static_dims(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _strip_debug_information(graph: onnx.ModelProto) -> None:
    """The tracer notes file paths and source lines of the machine that it ran on, which would change the graph's hash."""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    for item in (
        *graph.graph.node,
        *graph.graph.input,
        *graph.graph.output,
        *graph.graph.value_info,
        *graph.graph.initializer,
    ):
        del item.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
    del graph.graph.value_info[:]
