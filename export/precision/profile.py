"""Milliseconds of each residual block, by the profiler of the engine that runs the INT8 candidates.

A block's are those of its convolutions and of what the engine runs between them, by the names that it gives its
layers: those of the graph's nodes or outputs, with something after them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx

from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.export.graph.rewrite import group_of, trunk_nodes

RUNS = 5  # after one that warms up; of each layer the least counts, as a busy machine only adds

# (ONNX, uint8 images `[n, height, width, 3]`) -> layers and their milliseconds, of several runs
Profiler = Callable[[bytes, np.ndarray], Iterator[dict[str, float]]]


def block_milliseconds(graph: onnx.ModelProto, images: np.ndarray, engine: str) -> dict[str, float]:
    """Milliseconds an image of each block.

    Args:
        graph: as `build_graph` or `quantise` makes it.
        images: a batch, uint8 `[n, height, width, 3]`.
        engine: one of `PROFILERS`.
    """
    owners = _owners(graph)
    least: dict[str, float] = {}
    for run in PROFILERS[engine](graph.SerializeToString(), images):
        for layer, milliseconds in run.items():
            least[layer] = min(milliseconds, least.get(layer, milliseconds))
    found: dict[str, float] = defaultdict(float)
    for layer, milliseconds in least.items():
        if block := _owner(layer, owners):
            found[block] += milliseconds / len(images)
    return dict(found)


def _owners(graph: onnx.ModelProto) -> dict[str, str]:
    """The block of each node and of each output: a convolution's is its weight's, others follow what they read."""
    owners: dict[str, str] = {}
    for node in trunk_nodes(graph):
        if node.op_type == "Conv":
            block: str | None = group_of(node.input[1])
        else:
            block = next((owners[name] for name in node.input if name in owners), None)
        if block:
            owners |= dict.fromkeys((node.name, *node.output), block)
    return owners


def _owner(layer: str, owners: dict[str, str]) -> str | None:
    """By the longest beginning of the layer's name that is one of the graph's."""
    while layer and layer not in owners:
        layer = re.sub(r"(^|[_/])[^_/]*$", "", layer)
    return owners.get(layer)


def _openvino(graph: bytes, images: np.ndarray) -> Iterator[dict[str, float]]:
    core = openvino_core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": "YES"}
    request = core.compile_model(core.read_model(graph), "CPU", hints).create_infer_request()
    for number in range(RUNS + 1):
        request.infer([images], share_inputs=True)
        if number:
            yield {one.node_name: 1e3 * one.real_time.total_seconds() for one in request.get_profiling_info()}


def _onnxruntime(graph: bytes, images: np.ndarray) -> Iterator[dict[str, float]]:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="mgn-deploy-profile-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS + 1):
            session.run(None, {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            yield {event["name"].removesuffix("_kernel_time"): event["dur"] / 1e3}


PROFILERS: dict[str, Profiler] = {"openvino": _openvino, "onnxruntime": _onnxruntime}
