"""ONNX Runtime on the CPU: the portable engine."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend, refuse_fused_heads, refuse_shapes
from mgn_deploy.backends.onnxruntime.session import CPU, open_session
from mgn_deploy.config import ModelConfig
from mgn_deploy.machine import this_cpu


class OnnxRuntimeBackend(Backend):
    """A graph on the CPU provider, whatever other providers the installed build has."""

    name = "onnxruntime"

    def __init__(self, graph: bytes, config: ModelConfig) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.hardware = this_cpu()
        self._session = open_session(graph, {CPU: {}})
        ports = (*self._session.get_inputs(), *self._session.get_outputs())
        refuse_shapes([port.shape for port in ports], config)

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> OnnxRuntimeBackend:
        refuse_fused_heads(cls.name, fused_heads)
        return cls(graph, config)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"images": images})[0]
