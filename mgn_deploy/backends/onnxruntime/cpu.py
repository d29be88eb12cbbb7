"""ONNX Runtime on the CPU: the portable engine. `onnxruntime_cuda` is its GPU provider."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.backends.onnxruntime.session import CPU, open_session
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.packages import import_problem


def missing() -> str | None:
    return import_problem("onnxruntime", "cpu")


def open_engine(bundle: Bundle) -> Backend:
    return OnnxRuntimeBackend(bundle)


class OnnxRuntimeBackend:
    name = "onnxruntime"
    device = "CPU"

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        self._session = open_session(bundle.read(GRAPH), {CPU: {}})
        self._heads = FusedHeads.read(bundle) if bundle.manifest.heads == "fused" else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        outputs = self._session.run(None, {"images": images})
        return self._heads(outputs) if self._heads else outputs[0]
