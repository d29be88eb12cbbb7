"""OpenVINO, for CPUs of Intel, AMD and Arm."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend, refuse_fused_heads, refuse_shapes
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import this_cpu
from mgn_deploy.telemetry import without_openvino_telemetry


@functools.cache
def openvino_core() -> Any:
    """The `openvino.Core` of this process, which is never released.

    OpenVINO's CPU plugin gives the thread that loads it a signal stack and unmaps that in whichever thread releases the
    last Core: the next signal that reaches the first thread, Ctrl-C too, would end the process with SIGSEGV.
    """
    with without_openvino_telemetry():
        import openvino

    return openvino.Core()


class OpenVinoBackend(Backend):
    """A graph compiled by OpenVINO's CPU plugin, one request at a time with all cores."""

    name = "openvino"

    def __init__(self, graph: bytes, config: ModelConfig) -> None:
        core = openvino_core()
        import openvino

        self.version = openvino.__version__
        self.hardware = this_cpu()
        try:
            compiled = core.compile_model(
                core.read_model(graph),
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    # Without it OpenVINO runs float32 graphs in bfloat16 on CPUs that have it: precision is the graph's
                    # to say.
                    "INFERENCE_PRECISION_HINT": "f32",
                },
            )
        except RuntimeError as error:
            raise CannotRun(f"OpenVINO cannot run this graph: {str(error).strip().splitlines()[-1]}") from None
        ports = (*compiled.inputs, *compiled.outputs)
        refuse_shapes([[*port.partial_shape.to_string()[1:-1].split(",")] for port in ports], config)
        self._request = compiled.create_infer_request()

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> OpenVinoBackend:
        refuse_fused_heads(cls.name, fused_heads)
        return cls(graph, config)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._request.infer([images], share_inputs=True)
        return np.array(self._request.get_output_tensor(0).data)
