"""TensorRT, for datacenter GPUs, workstations and Jetson, and TensorRT-RTX, whose plans are built on a machine with no
GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.heads.cuda import heads_of_graph
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.package import import_tensorrt, logger, title
from mgn_deploy.backends.tensorrt.pipeline import CudaPipeline
from mgn_deploy.backends.tensorrt.plans import build_here, plan_for
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import DEFAULT_BATCH, GRAPH, TensorRtName
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.device import gpu_problem, this_gpu
from mgn_deploy.cuda.errors import cuda_errors
from mgn_deploy.errors import UserError
from mgn_deploy.packages import import_problem


class TensorRtBackend(Backend):
    """A plan on the first GPU. Threads share the plan's weights; each has an execution context of its own.

    Args:
        plan: as TensorRT serializes it. It is code: compare its hash first.
        config: of the model.
        graph: the ONNX graph that the heads' weights are taken from, where the plan ends with the feature maps; else
            None.
        host_code: the plan brings its own runtime, as version-compatible plans do.

    Raises:
        CannotRun: fused heads whose kernel cannot be compiled here.
        UserError: a plan that TensorRT does not open, or of another model.
    """

    name: ClassVar[TensorRtName] = "tensorrt"
    compiled = True

    def __init__(self, plan: bytes, config: ModelConfig, graph: bytes | None = None, host_code: bool = False) -> None:
        trt = import_tensorrt(self.name)
        self.version = str(trt.__version__)
        self.hardware = this_gpu().hardware()
        self.fused_heads = graph is not None
        self._config = config
        self._heads = None if graph is None else heads_of_graph(graph, config)
        logger(self.name).messages.clear()
        self._runtime = trt.Runtime(logger(self.name))
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(f"{title(self.name)} does not open the plan: {logger(self.name).messages.first_error()}")
        shape = tuple(self._engine.get_tensor_shape("images"))
        if shape[1:] != (config.height, config.width, 3):
            raise UserError(f"the plan takes images {shape[1:]}, not the manifest's: export the bundle again")
        profile = self._engine.get_tensor_profile_shape("images", 0)
        self.batch_limits = BatchLimits(*(int(shape[0]) for shape in profile))
        self._threads = threading.local()

    @classmethod
    def missing(cls) -> str | None:
        extra = ENGINES[cls.name].extra
        return ENGINES[cls.name].import_problem() or import_problem("cuda.core", extra) or gpu_problem()

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> TensorRtBackend:
        plan = build_here(graph, cls.name, this_gpu(), DEFAULT_BATCH, fused_heads)
        return cls(plan, config, graph if fused_heads else None)

    @classmethod
    def open(cls, bundle: Bundle, *, fused_heads: bool = False) -> TensorRtBackend:
        version = str(import_tensorrt(cls.name).__version__)
        plan = plan_for(bundle, cls.name, version, this_gpu(), fused_heads)
        # The hash of a plan of the bundle was compared, so that what it brings with it may run.
        host_code = any(entry.version_compatible for entry in bundle.manifest.engines)
        return cls(plan, bundle.config, bundle.read(GRAPH) if fused_heads else None, host_code)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        [embeddings] = self.stream([images])
        return embeddings

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Embed each batch, in order: while the GPU computes one, the caller's iterator makes the next."""
        return self._pipeline().run(batches)

    def buffer(self, images: int, height: int, width: int) -> np.ndarray:
        return self._pipeline().buffer(images)

    def _pipeline(self) -> CudaPipeline:
        """This thread's."""
        if not hasattr(self._threads, "pipeline"):
            with cuda_errors():
                self._threads.pipeline = CudaPipeline(self._engine, self.name, self._config.dim, self._heads)
        return self._threads.pipeline


class TensorRtRtxBackend(TensorRtBackend):
    """The same runtime API in the package `tensorrt_rtx`, for GeForce and RTX GPUs."""

    name = "tensorrt-rtx"
