"""ONNX Runtime's CUDA provider: float32 and float16 graphs as they are, with nothing built ahead."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.heads.cuda import CudaHeads, heads_of_graph, map_type
from mgn_deploy.backends.heads.fused import FusedHeads
from mgn_deploy.backends.onnxruntime.session import (
    CUDA,
    CUDA_OPTIONS,
    BoundSession,
    gpu_errors,
    gpu_provider_problem,
    open_session,
)
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.buffers import part, split_batch
from mgn_deploy.cuda.device import this_gpu

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
        import onnxruntime

        self.version = onnxruntime.__version__
        self.hardware = this_gpu().hardware()
        self.fused_heads = fused_heads
        self._session: BoundSession | _FusedSession
        if fused_heads:
            import onnx

            from mgn_deploy.backends.heads.cut import cut_trunk

            trunk = cut_trunk(onnx.load_from_string(graph)).SerializeToString()
            self._session = _FusedSession(trunk, heads_of_graph(graph, config))
        else:
            self._session = BoundSession(open_session(graph, {CUDA: CUDA_OPTIONS}), "cuda", config.dim)

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

    def __init__(self, graph: bytes, heads: FusedHeads) -> None:
        from cuda.core import Device, LegacyPinnedMemoryResource

        device = Device(0)
        device.set_current()
        self._stream = device.create_stream()
        self._session = open_session(
            graph, {CUDA: {**CUDA_OPTIONS, "user_compute_stream": str(int(self._stream.handle))}}
        )
        outputs = self._session.get_outputs()
        dtypes = [{"tensor(float)": "float32", "tensor(float16)": "float16"}.get(one.type, one.type) for one in outputs]
        self._maps = map_type(dtypes, ["nchw"] * len(outputs), [one.shape for one in outputs])
        self._names = [one.name for one in outputs]
        self._views = 2 if heads.flip else 1
        self._dim = heads.config.dim
        self._heads = CudaHeads(heads, self._maps, MAX_BATCH, device, self._stream)
        self._embeddings = device.allocate(MAX_BATCH * self._dim * 4, stream=self._stream)
        self._pinned = LegacyPinnedMemoryResource().allocate(MAX_BATCH * self._dim * 4)
        self._stream.sync()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [self._piece(piece) for piece in split_batch(images, MAX_BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, self._dim), np.float32)

    def _piece(self, images: np.ndarray) -> np.ndarray:
        import onnxruntime

        with gpu_errors():
            self._heads.prepare(len(images))
            binding: Any = self._session.io_binding()
            binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
            kind = np.dtype(self._maps.dtype).type
            for name, address, size in zip(self._names, self._heads.map_addresses, self._maps.sizes, strict=True):
                shape = (len(images) * self._views, self._maps.channels, *size)
                binding.bind_output(name, "cuda", 0, kind, shape, address)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            self._heads.launch(len(images), int(self._embeddings.handle), self._stream)
            bytes_out = len(images) * self._dim * 4
            part(self._embeddings, bytes_out).copy_to(part(self._pinned, bytes_out), stream=self._stream)
            self._stream.sync()
        rows = np.empty((len(images), self._dim), np.float32)
        ctypes.memmove(rows.ctypes.data, int(self._pinned.handle), rows.nbytes)
        return rows
