"""Batches through an inference network: copies beside computing, one CUDA graph a captured batch size. On a CPU the
same code runs with PyTorch's stand-ins for streams and events and without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mgn_deploy.backends.pipeline import SLOTS, Pipeline
from mgn_deploy.backends.torch_cuda.network import InferenceMGN
from mgn_deploy.cuda.errors import cuda_errors

_log = logging.getLogger("mgn_deploy")

SIZES = (1, 2, 4, 8, 16, 32, 64)  # images of the captured graphs; other batches are padded up to the next, or split


class TorchPipeline(Pipeline["_Slot"]):
    """One thread's streams, buffers and CUDA graphs.

    A graph is captured when a batch first needs its size. All graphs share one memory pool: they run one after another
    on one stream, and what they read and write are buffers outside of it.

    Args:
        network: on `device`.
        device: "cuda" or "cpu".
    """

    def __init__(self, network: InferenceMGN, device: str) -> None:
        self._network, self._device = network, torch.device(device)
        self._gpu = self._device.type == "cuda"
        self._cuda = torch.get_device_module(self._device)  # torch.cpu has streams and events that do nothing
        config = network.config
        image, dim, most = (config.height, config.width, 3), config.dim, SIZES[-1]
        with gpu_errors(), torch.inference_mode():
            self._upload, self._compute, self._download = (self._cuda.Stream() for _ in range(3))
            # Padding is computed with whatever was there before: it has to be something.
            self._images = torch.zeros((most, *image), dtype=torch.uint8, device=self._device)
            self._embeddings = torch.empty((most, dim), device=self._device)
            super().__init__([_Slot(image, dim, most, self._device) for _ in range(SLOTS)])
            self._pool = torch.cuda.graph_pool_handle() if self._gpu else None
            self._cuda.synchronize()
        self._runs: dict[int, Callable[[], None]] = {}

    def _submit(self, slot: _Slot, rows: int) -> None:
        cuda, size = self._cuda, next(size for size in SIZES if size >= rows)
        with gpu_errors(), torch.inference_mode():
            run = self._runs.get(size) or self._prepare(size)
            with cuda.stream(self._upload):
                slot.device_images[:rows].copy_(slot.pinned_images[:rows], non_blocking=True)
                slot.uploaded.record(self._upload)
            with cuda.stream(self._compute):
                slot.uploaded.wait(self._compute)
                self._images[:rows].copy_(slot.device_images[:rows])
                run()
                slot.device_embeddings[:rows].copy_(self._embeddings[:rows])
                slot.computed.record(self._compute)
            with cuda.stream(self._download):
                slot.computed.wait(self._download)
                slot.pinned_embeddings[:rows].copy_(slot.device_embeddings[:rows], non_blocking=True)
                slot.downloaded.record(self._download)

    def _wait(self, slot: _Slot) -> None:
        with gpu_errors():
            slot.downloaded.synchronize()

    def _drain(self) -> None:
        with gpu_errors():
            self._cuda.synchronize()

    def _prepare(self, size: int) -> Callable[[], None]:
        """What computes `_embeddings[:size]` of `_images[:size]` on the current stream."""
        images, embeddings = self._images[:size], self._embeddings[:size]

        def compute() -> None:
            # Algorithms by cuDNN's heuristics, not by timing them: another process then takes the same ones, and a
            # resumed run ends with the same bytes. Precision is the bundle's to say.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                embeddings.copy_(self._network(images))

        self._runs[size] = compute
        if self._gpu:
            refused = self._refused
            with torch.cuda.stream(self._compute):
                compute()  # settles what may not happen while a graph is captured: kernels are compiled and loaded
            self._compute.synchronize()
            if self._refused > refused:
                of = f"{self._refused} of {len(self._network.fusible)} convolutions"
                _log.warning(f"cuDNN has no fused engine for {of}: they run as several kernels")
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: others may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
                compute()
            self._runs[size] = graph.replay
        return self._runs[size]

    @property
    def _refused(self) -> int:
        return sum(not conv.fused for conv in self._network.fusible)


class _Slot:
    """Buffers for one batch on its way, on both sides, and the events that order its three steps."""

    def __init__(self, image: tuple[int, ...], dim: int, most: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.pinned_images = torch.empty((most, *image), dtype=torch.uint8, pin_memory=pinned)
        self.pinned_embeddings = torch.empty((most, dim), pin_memory=pinned)
        self.device_images = torch.empty((most, *image), dtype=torch.uint8, device=device)
        self.device_embeddings = torch.empty((most, dim), device=device)
        self.images, self.embeddings = self.pinned_images.numpy(), self.pinned_embeddings.numpy()
        events = torch.get_device_module(device)
        self.uploaded, self.computed, self.downloaded = (events.Event() for _ in range(3))


@contextmanager
def gpu_errors() -> Iterator[None]:
    """CUDA's errors in PyTorch's words as the UserErrors of `cuda_errors`."""
    with cuda_errors():
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"cudaError 2: {error}") from error
        except RuntimeError as error:
            number = getattr(error, "error_code", None)  # of torch.AcceleratorError, from PyTorch 2.8
            if number is None:
                raise
            raise RuntimeError(f"cudaError {number}: {error}") from error
