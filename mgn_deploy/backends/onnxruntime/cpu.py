"""ONNX Runtime on the CPU: the portable engine."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend, refuse_fused_heads, refuse_shapes
from mgn_deploy.backends.onnxruntime.session import CPU, open_session
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.config import ModelConfig
from mgn_deploy.machine import this_cpu


class OnnxRuntimeBackend(Backend):
    """A graph on the CPU provider, whatever other providers the installed build has."""

    name = "onnxruntime"

    def __init__(self, graph: bytes) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self.hardware = this_cpu()
        self._session = open_session(graph, {CPU: {}})

    @classmethod
    def missing(cls) -> str | None:
        return ENGINES[cls.name].import_problem()

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> OnnxRuntimeBackend:
        if fused_heads:
            refuse_fused_heads(cls.name)
        backend = cls(graph)
        session = backend._session
        refuse_shapes([port.shape for port in (*session.get_inputs(), *session.get_outputs())], config)
        return backend

    def __call__(self, images: np.ndarray) -> np.ndarray:
        embeddings: np.ndarray = self._session.run(None, {"images": images})[0]
        return embeddings
