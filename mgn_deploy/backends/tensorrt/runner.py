"""TensorRT, for datacenter GPUs, workstations and Jetson; `tensorrt_rtx` shares all but the name."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.heads.cuda import heads_of
from mgn_deploy.backends.tensorrt.package import import_problem_of, import_tensorrt, logger, title
from mgn_deploy.backends.tensorrt.pipeline import CudaPipeline
from mgn_deploy.backends.tensorrt.plans import plan_for
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.engine_entry import Flavour
from mgn_deploy.cuda.device import gpu_problem, this_gpu
from mgn_deploy.cuda.errors import cuda_errors
from mgn_deploy.errors import UserError
from mgn_deploy.packages import import_problem


def missing() -> str | None:
    return missing_parts("tensorrt")


def open_engine(bundle: Bundle) -> Backend:
    return TensorRtBackend(bundle, "tensorrt")


def missing_parts(flavour: Flavour) -> str | None:
    """What of package, CUDA driver door and GPU is not there, as `missing` says it."""
    return import_problem_of(flavour) or import_problem("cuda.core", flavour.replace("_", "-")) or gpu_problem()


class TensorRtBackend:
    """A plan on the first GPU. Threads share the plan's weights; each has an execution context of its own.

    Raises:
        CannotRun: the bundle has no plan for this GPU and TensorRT version, and none can be built here.
        UserError: a plan that is not what the manifest says, or that TensorRT does not open.
    """

    def __init__(self, bundle: Bundle, flavour: Flavour) -> None:
        trt = import_tensorrt(flavour)
        gpu = this_gpu()
        self.name: str = flavour
        self.version = str(trt.__version__)
        self.device = gpu.name
        self._flavour: Flavour = flavour
        self._config = bundle.config
        self._heads = heads_of(bundle)
        plan = plan_for(bundle, flavour, self.version, gpu)
        logger(flavour).messages.clear()
        self._runtime = trt.Runtime(logger(flavour))
        if any(entry.version_compatible for entry in bundle.manifest.engines):
            self._runtime.engine_host_code_allowed = (
                True  # such a plan brings its runtime with it; its hash was compared
            )
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(
                f"{title(flavour)} does not open the plan of {bundle.folder}: {logger(flavour).messages.first_error()}"
            )
        shape = tuple(self._engine.get_tensor_shape("images"))
        if shape[1:] != (self._config.height, self._config.width, 3):
            raise UserError(f"the plan of {bundle.folder} takes images {shape[1:]}, not the manifest's: export it anew")
        # Fewest, best and most images a call.
        self.profile = tuple(int(shape[0]) for shape in self._engine.get_tensor_profile_shape("images", 0))
        self._threads = threading.local()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        [embeddings] = self.stream([images])
        return embeddings

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Embeddings of each batch, in order, with up to two batches on their way at once.

        While the GPU computes one batch the next is copied to it, and the caller's iterator makes the one after.
        """
        with cuda_errors():
            pipeline = self._pipeline()
        yield from pipeline.run(batches)

    def _pipeline(self) -> CudaPipeline:
        if not hasattr(self._threads, "pipeline"):
            self._threads.pipeline = CudaPipeline(self._engine, self._flavour, self._config.dim, self._heads)
        return self._threads.pipeline
