"""OpenVINO, for CPUs of Intel, AMD and Arm."""

from __future__ import annotations

from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.packages import import_problem


def missing() -> str | None:
    return import_problem("openvino", "cpu") or import_problem("onnx", "cpu")


def open_engine(bundle: Bundle) -> Backend:
    return OpenVinoBackend(bundle)


class OpenVinoBackend:
    name = "openvino"
    device = "CPU"

    def __init__(self, bundle: Bundle) -> None:
        import onnx
        import onnx.inliner
        import openvino

        self.version = openvino.__version__
        # OpenVINO knows no model-local functions: the heads' body takes the place of its call.
        graph = onnx.inliner.inline_local_functions(onnx.load_from_string(bundle.read(GRAPH)))
        core = openvino.Core()
        model = core.read_model(graph.SerializeToString())
        self._compiled = core.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                # Without it OpenVINO runs float32 graphs in bfloat16 on CPUs that have it: precision is the graph's to say.
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        self._request = self._compiled.create_infer_request()
        self._heads = FusedHeads.read(bundle) if bundle.manifest.heads == "fused" else None
        self._maps = len(self._compiled.outputs)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._request.infer([images], share_inputs=True)
        if self._heads:
            return self._heads([_numbers(self._request.get_output_tensor(i)) for i in range(self._maps)])
        return np.array(self._request.get_output_tensor(0).data)


def _numbers(tensor: Any) -> np.ndarray:
    """A tensor's values. NumPy knows no bfloat16, and OpenVINO gives its bits as if they were float16's."""
    values: np.ndarray = tensor.data
    if tensor.element_type.get_type_name() != "bf16":
        return values
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
