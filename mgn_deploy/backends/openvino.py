"""OpenVINO: the fastest engine on CPUs (Intel, AMD and Arm)."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends import Backend, import_problem
from mgn_deploy.bundle import GRAPH, Bundle


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

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._request.infer([images], share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)
