"""The heads as TensorRT or TensorRT-RTX does them: an engine of nothing but the nodes of `export/graph/heads.py`.

In half precision that is a faster rival than what ships, as there is less to move and to compute: weights, bias,
product and sum are of the maps' type here, while exports cast the maxima to float32 and keep weights and bias in it
(`export/precision/half.py`).
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from mgn_deploy.backends.tensorrt.builder import capabilities
from mgn_deploy.backends.tensorrt.graph import PreparedGraph
from mgn_deploy.backends.tensorrt.network import build_network, parsed_network, quiet
from mgn_deploy.backends.tensorrt.package import import_problem_of, import_tensorrt, logger, title
from mgn_deploy.bench.kernel.cases import DTYPES, Case, Inputs
from mgn_deploy.bench.kernel.contenders import Contender
from mgn_deploy.bundle.engine_entry import TensorRtName
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.graph.heads import FEATURES, OPSET, head_nodes

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def heads_graph(case: Case, inputs: Inputs) -> onnx.ModelProto:
    """Maps `map_0`, ... as the case lays them out -> `features` of the maps' type, or float32 `embeddings`."""
    kind, transposes, graph_inputs = TYPES[case.dtype], list[NodeProto](), []
    for index, (height, width) in enumerate(case.sizes):
        nhwc = case.layout == "nhwc"
        shape = [case.rows, height, width, case.channels] if nhwc else [case.rows, case.channels, height, width]
        given = f"given_{index}" if nhwc else f"map_{index}"
        graph_inputs.append(helper.make_tensor_value_info(given, kind, shape))
        if nhwc:
            transposes.append(helper.make_node("Transpose", [given], [f"map_{index}"], perm=[0, 3, 1, 2]))
    config = ModelConfig(branches=case.branches, reduced_width=case.reduced)
    nodes, constants = head_nodes(config, [height for height, _ in case.sizes], case.output == "mirror_embeddings")
    features = next(index for index, node in enumerate(nodes) if node.output[0] == FEATURES)
    head, tail = nodes[: features + 1], nodes[features + 1 :]
    constants += [
        _constant("heads.weight", inputs.weight.transpose(1, 2), kind),
        _constant("heads.bias", inputs.bias.to(DTYPES[case.dtype]).unsqueeze(1), kind),
    ]
    output = helper.make_tensor_value_info(FEATURES, kind, [case.rows, config.dim])
    if case.output == "features":
        tail = []
    else:
        wide = f"{FEATURES}/float"
        for node in tail:
            node.input[:] = [wide if name == FEATURES else name for name in node.input]
        tail.insert(0, helper.make_node("Cast", [FEATURES], [wide], to=TensorProto.FLOAT))
        output = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [case.images, config.dim])
    read = {name for node in (*head, *tail) for name in node.input}
    constants = [tensor for tensor in constants if tensor.name in read]
    return helper.make_model(
        helper.make_graph([*transposes, *head, *tail], "heads", graph_inputs, [output], constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )


def _constant(name: str, tensor: Tensor, kind: int) -> TensorProto:
    dense = tensor.cpu().contiguous()
    if kind != TensorProto.BFLOAT16:
        return numpy_helper.from_array(dense.numpy(), name)
    bits: np.ndarray = dense.view(torch.int16).numpy()
    return TensorProto(name=name, data_type=kind, dims=dense.shape, raw_data=bits.tobytes())


def build_plan(graph: onnx.ModelProto, name: TensorRtName, compute_capability: str) -> bytes:
    """A plan for GPUs of that compute capability, as in "8.9"; TensorRT builds for the GPU of this machine.

    Raises:
        CannotRun: TensorRT-RTX does not build for it.
        UserError: the graph is refused.
    """
    trt = import_tensorrt(name)
    if name == "tensorrt-rtx" and compute_capability not in capabilities():
        raise CannotRun(
            f"{title(name)} builds for compute capability {', '.join(capabilities())}, not for {compute_capability}"
        )
    with quiet(name):
        network = parsed_network(name, PreparedGraph(graph.SerializeToString(), "", 0, 0))
        config = network.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if name == "tensorrt-rtx":
            config.num_compute_capabilities = 1
            member = getattr(trt.ComputeCapability, "SM" + compute_capability.replace(".", ""))
            config.set_compute_capability(member, 0)
        return build_network(name, network, config, None)


def tensorrt(case: Case, inputs: Inputs) -> Contender:
    """
    Raises:
        CannotRun: neither TensorRT nor TensorRT-RTX is installed, or it does not build for this GPU.
        UserError: it does not take the graph or the plan.
    """
    problems: dict[TensorRtName, str | None] = {name: import_problem_of(name) for name in ("tensorrt", "tensorrt-rtx")}
    name = next((one for one, problem in problems.items() if problem is None), None)
    if name is None:
        raise CannotRun("; ".join(str(problem) for problem in problems.values()))
    major, minor = torch.cuda.get_device_capability()
    graph = heads_graph(case, inputs)
    plan = build_plan(graph, name, f"{major}.{minor}")
    engine = import_tensorrt(name).Runtime(logger(name)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context() if engine else None
    if context is None:
        raise UserError(f"{title(name)} does not open its plan: {logger(name).messages.first_error()}")
    (output,) = graph.graph.output
    dtype = torch.float32 if output.name == "embeddings" else inputs.weight.dtype
    result = torch.empty(case.images, case.features * case.reduced, dtype=dtype, device=inputs.weight.device)
    for value, map_ in zip(graph.graph.input, inputs.maps, strict=True):
        context.set_tensor_address(value.name, map_.data_ptr())
    context.set_tensor_address(output.name, result.data_ptr())

    def run() -> Tensor:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise UserError(f"{title(name)} cannot run the engine: {logger(name).messages.first_error()}")
        return result

    return Contender(run, lambda: result.fill_(torch.nan), {"engine": title(name)})
