"""ONNX Runtime: the portable engine. Runs on CUDA where the installed build has it, else on the CPU."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends import Backend, import_problem
from mgn_deploy.bundle import GRAPH, Bundle
from mgn_deploy.errors import CannotRun


def missing() -> str | None:
    return import_problem("onnxruntime", "cpu")


def open_engine(bundle: Bundle) -> Backend:
    return OnnxRuntimeBackend(bundle)


class OnnxRuntimeBackend:
    name = "onnxruntime"

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime

        self.version = onnxruntime.__version__
        cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        self.device = "CUDA" if cuda else "CPU"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                bundle.read(GRAPH), options, providers=[f"{self.device}ExecutionProvider"]
            )
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            raise CannotRun(f"ONNX Runtime has no kernel for this graph on {self.device}: {error}") from None
        if cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise CannotRun(
                "onnxruntime-gpu is installed but its CUDA provider did not load: install CUDA and cuDNN with "
                "pip install 'onnxruntime-gpu[cuda,cudnn]', or install onnxruntime for the CPU"
            )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(["embeddings"], {"images": images})[0]
