"""ONNX Runtime's CUDA provider: float32 and float16 graphs as they are, with nothing built ahead."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.heads.cuda import CudaHeads, heads_of_graph, map_type
from mgn_deploy.backends.onnxruntime.session import (
    CUDA,
    CUDA_CHANNELS_LAST,
    CUDA_OPTIONS,
    BoundSession,
    gpu_errors,
    gpu_provider_problem,
    open_session,
)
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.buffers import array_of, part, split_batch
from mgn_deploy.cuda.device import this_gpu
from mgn_deploy.errors import CannotRun

if TYPE_CHECKING:
    from mgn_deploy.backends.heads.cut import FusedHeads

_log = logging.getLogger("mgn_deploy")

MAX_BATCH = 64  # images that the maps' buffers hold; larger batches are run in parts


class OnnxRuntimeCudaBackend(Backend):
    """A graph on the first GPU.

    Raises:
        CannotRun: the provider does not load, or leaves a part of the graph to the CPU.
    """

    name = "onnxruntime-cuda"
    compiled = True  # cuDNN's algorithms are chosen for the GPU
    batch_limits = BatchLimits(1, 8, MAX_BATCH)

    def __init__(self, graph: bytes, config: ModelConfig, fused_heads: bool = False) -> None:
        import onnx
        import onnxruntime

        from mgn_deploy.backends.heads.cut import cut_trunk, is_half

        self.version = onnxruntime.__version__
        self.hardware = this_gpu().hardware()
        self.fused_heads = fused_heads
        self._session: BoundSession | _FusedSession
        model = onnx.load_from_string(graph)
        if fused_heads:
            self._session = _FusedSession(cut_trunk(model), is_half(model), heads_of_graph(graph, config))
        else:
            session, _ = open_cuda(graph, graph if is_half(model) else None)
            self._session = BoundSession(session, "cuda", config.dim)

    @classmethod
    def missing(cls) -> str | None:
        return gpu_provider_problem(CUDA)

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> OnnxRuntimeCudaBackend:
        return cls(graph, config, fused_heads)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._session(images)


class _FusedSession:
    """The trunk by ONNX Runtime and the heads by our kernel, one after the other on one stream of ours."""

    def __init__(self, trunk: Any, half: bool, heads: FusedHeads) -> None:
        from cuda.core import Device, LegacyPinnedMemoryResource

        from mgn_deploy.backends.heads.cut import channels_last

        device = Device(0)
        device.set_current()
        self._stream = device.create_stream()
        self._session, layout = open_cuda(
            trunk.SerializeToString(),
            channels_last(trunk).SerializeToString() if half else None,
            user_compute_stream=str(int(self._stream.handle)),
        )
        outputs = self._session.get_outputs()
        dtypes = [{"tensor(float)": "float32", "tensor(float16)": "float16"}.get(one.type, one.type) for one in outputs]
        shapes = [one.shape if layout == "nchw" else [one.shape[axis] for axis in (0, 3, 1, 2)] for one in outputs]
        self._maps = map_type(dtypes, [layout] * len(outputs), shapes)
        self._names = [one.name for one in outputs]
        self._views = 2 if heads.flip else 1
        self._dim = heads.config.dim
        self._heads = CudaHeads(heads, self._maps, MAX_BATCH, device, self._stream)
        self._embeddings = device.allocate(MAX_BATCH * self._dim * 4, stream=self._stream)
        self._pinned = LegacyPinnedMemoryResource().allocate(MAX_BATCH * self._dim * 4)
        self._rows = array_of(self._pinned, np.float32, (MAX_BATCH, self._dim))
        self._stream.sync()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [self._run(some) for some in split_batch(images, MAX_BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self._dim), np.float32)

    def _run(self, images: np.ndarray) -> np.ndarray:
        import onnxruntime

        with gpu_errors():
            self._heads.prepare(len(images))
            binding: Any = self._session.io_binding()
            binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
            kind = np.dtype(self._maps.dtype).type
            for name, address, size in zip(self._names, self._heads.map_addresses, self._maps.sizes, strict=True):
                views, channels = len(images) * self._views, self._maps.channels
                shape = (views, channels, *size) if self._maps.layout == "nchw" else (views, *size, channels)
                binding.bind_output(name, "cuda", 0, kind, shape, address)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            self._heads.launch(len(images), int(self._embeddings.handle), self._stream)
            bytes_out = len(images) * self._dim * 4
            part(self._embeddings, bytes_out).copy_to(part(self._pinned, bytes_out), stream=self._stream)
            self._stream.sync()
        return self._rows[: len(images)].copy()


def open_cuda(graph: bytes, graph_channels_last: bytes | None, **options: str) -> tuple[Any, str]:
    """Open one of two graphs on the GPU: the one for channels last where there is one and this build of ONNX Runtime
    has kernels for them.

    Args:
        graph: for channels first.
        graph_channels_last: None for float32, whose tensor cores would round.
        options: of the provider, besides those that all sessions have.

    Returns:
        The session, and "nhwc" or "nchw".

    Raises:
        CannotRun: neither can be opened.
    """
    if graph_channels_last is not None:
        try:
            return open_session(graph_channels_last, {CUDA: {**CUDA_OPTIONS, **CUDA_CHANNELS_LAST, **options}}), "nhwc"
        except CannotRun as error:
            _log.info(f"ONNX Runtime computes channels first: {error}")
    return open_session(graph, {CUDA: {**CUDA_OPTIONS, **options}}), "nchw"
