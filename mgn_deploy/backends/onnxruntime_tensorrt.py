"""ONNX Runtime's TensorRT provider, and its CUDA provider for what TensorRT leaves.

Its engines are built when a bundle is first opened on a GPU, which takes minutes, and are kept beside the plans
(`export/plan_cache.py`), for batches of 1 to 64 images.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mgn_deploy.backends import Backend, import_problem
from mgn_deploy.bundle import GRAPH, Bundle
from mgn_deploy.cuda_pipeline import pieces
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.gpu import Gpu, this_gpu
from mgn_deploy.onnxruntime_session import (
    CUDA,
    CUDA_OPTIONS,
    TENSORRT,
    BoundSession,
    gpu_provider_problem,
    open_session,
)
from mgn_deploy.tensorrt_door import import_problem_of
from mgn_deploy.tensorrt_plans import DEFAULT_BATCH

if TYPE_CHECKING:
    from mgn_deploy.export.trt_graph import PreparedGraph

_log = logging.getLogger("mgn_deploy")
PROVIDER_LIBRARY = "libonnxruntime_providers_tensorrt.so"


def missing() -> str | None:
    return gpu_provider_problem(TENSORRT) or import_problem("onnx", "gpu") or tensorrt_library_problem()


def open_engine(bundle: Bundle) -> Backend:
    return OnnxRuntimeTensorRtBackend(bundle)


def tensorrt_library_problem() -> str | None:
    """Load the TensorRT that ONNX Runtime was built for, also from pip's tensorrt package; or say which one is missing."""
    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / "capi" / PROVIDER_LIBRARY
    needed = re.search(rb"libnvinfer\.so\.(\d+)", provider.read_bytes()) if provider.is_file() else None
    if needed is None:
        return None  # linked in another way: the session will tell
    import_problem_of("tensorrt")  # where it is installed, it brings its libraries with it
    library, version = needed[0].decode(), int(needed[1])
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return (
            f"onnxruntime {onnxruntime.__version__} needs TensorRT {version} ({error}): "
            f"pip install 'tensorrt>={version},<{version + 1}'"
        )
    return None


class OnnxRuntimeTensorRtBackend:
    """On the first GPU.

    Raises:
        CannotRun: half precision or fused heads; or a provider does not load, TensorRT takes nothing of the graph, or a part is left to the CPU.
        UserError: the engines' folder is not writable, or CUDA failed.
    """

    name = "onnxruntime_tensorrt"

    def __init__(self, bundle: Bundle) -> None:
        precision, quantisation = bundle.manifest.precision, bundle.manifest.quantisation
        if precision in ("fp16", "bf16") or (quantisation and quantisation.engine == "tensorrt-rtx"):
            # Its networks are weakly typed (1.31: createNetworkV2(0)). Without a flag TensorRT refuses half precision
            # (NVIDIA/TensorRT#3277); with it, it may take it anywhere, also for what the graph keeps in float32.
            raise CannotRun(
                f"ONNX Runtime's TensorRT provider does not take half precision from the graph, which {bundle.folder} has ({precision}): "
                "choose another --backend"
            )
        if bundle.manifest.heads == "fused":
            raise CannotRun(
                "ONNX Runtime's TensorRT provider does not go on to fused heads: choose another --backend, or export with --heads plain"
            )
        import onnx
        import onnxruntime

        from mgn_deploy.export.trt_graph import prepare

        graph = prepare(onnx.load_from_string(bundle.read(GRAPH)))
        self.version = onnxruntime.__version__
        gpu = this_gpu()
        self.device = gpu.name
        # Float32 is the graph's to say, and this provider has no option for it (onnxruntime#26029). For the whole process.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        options = tensorrt_options(graph, precision == "int8")
        folder = engine_folder(graph, options, self.version, gpu)
        providers = {TENSORRT: {**options, "trt_engine_cache_path": str(folder)}, CUDA: CUDA_OPTIONS}
        if not any(folder.iterdir()):
            _log.warning(f"building TensorRT engines of {bundle.folder} for {gpu.name}, once: this may take minutes")
        try:
            session = open_session(graph.content, providers)
        except CannotRun as error:
            raise CannotRun(f"{error} (its engines are kept in {folder}: without it they are built anew)") from None
        self.profile = DEFAULT_BATCH
        self._session, self._dim = BoundSession(session, "cuda", bundle.config.dim), bundle.config.dim

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [self._session(piece) for piece in pieces(images, self.profile[2])]
        return np.concatenate(parts) if parts else np.empty((0, self._dim), np.float32)


def tensorrt_options(graph: PreparedGraph, int8: bool) -> dict[str, str]:
    """The provider's options for a graph, but for the folder of its engines.

    Args:
        graph: as TensorRT's parser takes it.
        int8: it has Q/DQ pairs. The flag allows INT8; where, only the pairs say (explicit quantisation).
    """
    fewest, best, most = (f"{graph.input_name}:{size}x{graph.height}x{graph.width}x3" for size in DEFAULT_BATCH)
    return {
        "device_id": "0",
        # Without these an engine is built anew for each batch size beyond those seen.
        "trt_profile_min_shapes": fewest,
        "trt_profile_opt_shapes": best,
        "trt_profile_max_shapes": most,
        "trt_int8_enable": str(int8),  # these are read as True and False, not as 1 and 0
        "trt_engine_cache_enable": "True",
    }


def engine_folder(graph: PreparedGraph, options: dict[str, str], version: str, gpu: Gpu) -> Path:
    """A folder of the engines of this graph and these options alone: ONNX Runtime finds them by the graph's structure,
    whatever its weights are (onnxruntime#6455).

    Raises:
        UserError: it cannot be made.
    """
    from mgn_deploy.export.plan_cache import cache_key, plan_folder

    facts = {
        "onnxruntime": version,
        "gpu": vars(gpu),
        "tf32": os.environ.get("NVIDIA_TF32_OVERRIDE"),
        "options": options,
    }
    folder = plan_folder() / "onnxruntime" / cache_key(graph.content, facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a writable place") from None
    return folder
