"""A session of ONNX Runtime on the providers that were asked for, or a refusal; and runs bound to a device's memory.

ONNX Runtime goes on with the CPU where a provider does not load, and puts there what a provider has no kernel for, with
a line on stderr at most; `disable_fallback` is about failing runs only (microsoft/onnxruntime#17801, #23647). Here
either is an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.cuda.errors import cuda_errors
from mgn_deploy.errors import CannotRun
from mgn_deploy.packages import import_problem

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

CUDA_OPTIONS = {
    "device_id": "0",
    # The default times cuDNN's algorithms for each new batch size, and may take another one in the next process:
    # results then differ in their last bits (onnxruntime#19822), and a resumed `embed` must end with the same bytes.
    "cudnn_conv_algo_search": "HEURISTIC",
    "use_tf32": "0",  # precision is the graph's to say
}
# For float16: cuDNN's kernels for tensor cores read channels last.
CUDA_CHANNELS_LAST = {"prefer_nhwc": "1"}
TOOLKITS = ("CUDA_HOME", "CUDA_PATH")  # environment variables of where a CUDA toolkit lies
KEPT_SIZES = 4  # batch sizes whose buffers stay: `embed` has one, the proof four
# How ONNX Runtime words CUDA's errors, and its own where its arena finds no more memory.
_CUDA_FAILURE = re.compile(r"CUDA failure (\d+)")
_NO_MEMORY = re.compile(r"Failed to allocate memory for requested buffer")


def gpu_provider_problem(provider: str) -> str | None:
    """Why a GPU provider cannot be asked for here and what to install, or None. CUDA's libraries are loaded on the
    way."""
    problem = import_problem("onnxruntime", "gpu")
    if problem:
        return problem
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return (
            f"the installed onnxruntime {onnxruntime.__version__} is built without {provider} "
            "(pip uninstall onnxruntime, then pip install 'mgn-deploy[gpu]')"
        )
    return gpu_problem() or import_problem("cuda.core", "gpu") or cuda_library_problem()


@cache
def cuda_library_problem() -> str | None:
    """Load CUDA and cuDNN, also from pip's nvidia packages and from a toolkit, where ONNX Runtime does not look by
    itself; or say what is missing."""
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):
        return f"onnxruntime {onnxruntime.__version__} is older than 1.21 (pip install --upgrade 'mgn-deploy[gpu]')"
    missing = _load_from(None)
    if not missing:
        return None
    for folder in _toolkit_folders():
        if not _load_from(folder):
            return None
    return (
        f"CUDA's libraries cannot be loaded ({missing[0]}): pip install 'onnxruntime-gpu[cuda,cudnn]', or set "
        "CUDA_HOME to the folder of a toolkit"
    )


def _load_from(folder: str | None) -> list[str]:
    """What ONNX Runtime says of libraries that it finds neither there (None: pip's packages) nor where the system
    looks."""
    import onnxruntime

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls(directory=folder)
    lines = (line for line in said.getvalue().splitlines() if line.startswith("Failed to load "))
    # It tries a file by its path first, and then the system's of that name: only the second counts.
    return [line for line in lines if not os.path.isabs(line.removeprefix("Failed to load ").partition(":")[0])]


def _toolkit_folders() -> list[str]:
    roots = [*filter(None, map(os.environ.get, TOOLKITS)), "/usr/local/cuda"]
    folders = (os.path.join(root, *below) for root in roots for below in (("lib64",), ("lib",), ("bin",)))
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


def open_session(graph: bytes, providers: Mapping[str, Mapping[str, str]]) -> Any:
    """An `InferenceSession` whose every operator is on one of these providers, and at least one on the first.

    Args:
        graph: ONNX.
        providers: options by provider, the preferred one first.

    Raises:
        CannotRun: a provider does not load, has no kernel for an operator, or takes none.
    """
    try:
        session = _session(graph, providers, cpu=CPU in providers)
    except CannotRun as error:
        if "assigned to the default CPU EP" not in str(error):
            raise
        # Only a session that may use the CPU can tell why the other one was not to be had.
        session = _session(graph, providers, cpu=True)
        _refuse_lost(session, providers)
        left = placement(session).get(CPU, [])
        raise CannotRun(
            f"{', '.join(providers)} cannot run {', '.join(sorted(set(left))) or 'all'} of this graph's operators, and "
            "ONNX Runtime would run them on the CPU: choose another --backend"
        ) from None
    _refuse_lost(session, providers)
    placed, first = placement(session), next(iter(providers))
    if placed and first not in placed:
        raise CannotRun(
            f"{first} takes none of this graph's operators, {', '.join(placed)} all: choose another --backend"
        )
    return session


def placement(session: Any) -> dict[str, list[str]]:
    """The types of the operators that each provider runs; empty before ONNX Runtime 1.24, which does not tell."""
    placed: dict[str, list[str]] = {}
    if hasattr(session, "get_provider_graph_assignment_info"):
        for part in session.get_provider_graph_assignment_info():
            placed.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    return placed


def _session(graph: bytes, providers: Mapping[str, Mapping[str, str]], cpu: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Our graphs compute no shapes, so that no operator of theirs has a reason to be on the CPU beside a GPU provider.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "0" if cpu else "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # The constructor, too, goes on with the CPU after an error, unless told.
        session = onnxruntime.InferenceSession(
            graph, options, providers=[(name, dict(its)) for name, its in providers.items()], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's have no base of their own
        raise CannotRun(f"ONNX Runtime cannot open this graph with {', '.join(providers)}: {_reason(error)}") from error
    session.disable_fallback()
    return session


def _refuse_lost(session: Any, providers: Mapping[str, Mapping[str, str]]) -> None:
    import onnxruntime

    lost = [name for name in providers if name not in session.get_providers()]
    if lost:
        raise CannotRun(
            f"onnxruntime {onnxruntime.__version__} did not load {', '.join(lost)}, and would run on "
            f"{session.get_providers()[0]} instead: install the CUDA and cuDNN that it was built for (pip install "
            "'onnxruntime-gpu[cuda,cudnn]'; https://onnxruntime.ai/docs/install)"
        )


def _reason(error: Exception) -> str:
    """In one line, without the position in ONNX Runtime's source and its error number."""
    line = " ".join(str(error).split())
    failure = re.search(r"CUDA failure \d+: [^;]*", line)
    if failure:
        return failure[0].rstrip()
    line = re.sub(r"^.*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return re.sub(r"^/\S+:\d+ .*?\) ", "", line).rstrip(". ")


@contextlib.contextmanager
def gpu_errors() -> Iterator[None]:
    """CUDA's errors in ONNX Runtime's words as the UserErrors of `cuda_errors`."""
    with cuda_errors():
        try:
            yield
        except Exception as error:
            text = _CUDA_FAILURE.sub(r"cudaError \1", _NO_MEMORY.sub(r"cudaError 2: \g<0>", str(error)))
            if text == str(error):
                raise
            raise RuntimeError(text) from error


class BoundSession:
    """A session's runs with its images and embeddings in the memory of a device, in buffers that stay for a few batch
    sizes.

    Each batch is copied there once and its embeddings back once, both blocking. The copy is from pageable memory: CUDA
    moves it by pinned buffers of its own, so that one more copy into a pinned buffer of ours would gain nothing while
    nothing overlaps it.

    Args:
        session: with input `images` and float32 output `embeddings` `[n, dim]`.
        device: "cuda"; "cpu" runs the same code without a GPU.
        dim: of an embedding.
    """

    def __init__(self, session: Any, device: str, dim: int) -> None:
        self._session, self._device, self._dim = session, device, dim
        self._buffers: OrderedDict[tuple[Any, ...], tuple[Any, Any]] = OrderedDict()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """As `Backend.__call__`.

        Raises:
            UserError: CUDA failed.
        """
        with gpu_errors():
            binding, buffer = self._bound(images)
            buffer.update_inplace(images)
            # Binding copies what is not where the graph reads it, then and never again: bound for each run, it cannot
            # be a batch behind.
            binding.bind_ortvalue_input("images", buffer)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return binding.copy_outputs_to_cpu()[0]

    def _bound(self, images: np.ndarray) -> tuple[Any, Any]:
        """The binding for batches of this shape, and its input buffer."""
        # Of any shape and type: ONNX Runtime compares them with the graph's, where a copy would compare the size alone.
        key = (images.shape, images.dtype)
        if key not in self._buffers:
            while len(self._buffers) >= KEPT_SIZES:
                self._buffers.popitem(last=False)
            binding = self._session.io_binding()
            binding.bind_ortvalue_output("embeddings", self._new((len(images), self._dim), np.dtype(np.float32)))
            self._buffers[key] = binding, self._new(images.shape, images.dtype)
        self._buffers.move_to_end(key)
        return self._buffers[key]

    def _new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self._device, 0)
