"""ONNX Runtime's CUDA provider: float32 and float16 graphs as they are, with nothing built ahead."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends import Backend
from mgn_deploy.bundle import Bundle
from mgn_deploy.gpu import this_gpu
from mgn_deploy.onnxruntime_session import (
    CUDA,
    CUDA_OPTIONS,
    BoundSession,
    gpu_provider_problem,
    open_session,
    whole_graph,
)


def missing() -> str | None:
    return gpu_provider_problem(CUDA)


def open_engine(bundle: Bundle) -> Backend:
    return OnnxRuntimeCudaBackend(bundle)


class OnnxRuntimeCudaBackend:
    """On the first GPU.

    Raises:
        CannotRun: the provider does not load, or leaves a part of the graph to the CPU.
    """

    name = "onnxruntime_cuda"

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        graph = whole_graph(bundle)
        self.version = onnxruntime.__version__
        self.device = this_gpu().name
        self._session = BoundSession(open_session(graph, {CUDA: CUDA_OPTIONS}), "cuda", bundle.config.dim)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._session(images)
