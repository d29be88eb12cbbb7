"""PyTorch on a GPU in the bundle's precision: needs the bundle's reference weights and no TensorRT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.backends.heads.cuda import check_kernel
from mgn_deploy.backends.torch import TorchBackend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.choices import Precision
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.device import gpu_problem, this_gpu
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import this_cpu
from mgn_deploy.packages import import_problem


class TorchCudaBackend(Backend):
    """The bundle's weights with folded norms in float32, float16 or bfloat16, as the bundle's graph is, channels last,
    one CUDA graph a batch size, on the first GPU.

    Args:
        weights: of safetensors, as trained.
        config: of the model.
        flip: average the features of each image and of its mirror.
        precision: of the bundle; "int8" is none that this engine has.
        fused_heads: the heads run as the stripe-pool-reduce kernel, not as PyTorch's operators.
        device: "cuda"; "cpu" runs the same code without fused operators and graphs, for its tests.
    """

    name = "torch-cuda"
    compiled = True  # cuDNN's algorithms are chosen for the GPU
    batch_limits = BatchLimits(1, 8, 64)

    def __init__(
        self,
        weights: bytes,
        config: ModelConfig,
        flip: bool,
        precision: Precision,
        *,
        fused_heads: bool = False,
        device: str = "cuda",
    ) -> None:
        import torch

        from mgn_deploy.backends.torch_cuda.network import DTYPES, InferenceMGN
        from mgn_deploy.backends.torch_cuda.pipeline import TorchPipeline, gpu_errors
        from mgn_deploy.train.weights import reference_model

        if precision not in DTYPES:
            raise CannotRun(f"{self.name} computes in {', '.join(DTYPES)}, and this bundle is in {precision}")
        if fused_heads:
            check_kernel(config, flip, self.batch_limits.max)
        self.version = str(torch.__version__)
        self.hardware = this_cpu()
        if device == "cuda":
            gpu = this_gpu()
            self.hardware = gpu.hardware()
            if precision == "bf16" and float(gpu.compute_capability) < 8:
                raise CannotRun(
                    f"{gpu.name} (compute capability {gpu.compute_capability}) has no bfloat16: it needs 8.0"
                )
        self.fused_heads = fused_heads
        network = InferenceMGN(reference_model(weights, config), flip, DTYPES[precision], kernel=fused_heads).eval()
        with gpu_errors():
            network.to(device)
        if device == "cuda":
            network.fuse()
        self._pipeline = TorchPipeline(network, device)

    @classmethod
    def missing(cls) -> str | None:
        problem = TorchBackend.missing() or gpu_problem()
        return problem or _torch_problem() or import_problem("cuda.core", "gpu")

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> TorchCudaBackend:
        raise CannotRun(f"{cls.name} runs weights, not a graph")

    @classmethod
    def open(cls, bundle: Bundle, *, fused_heads: bool = False) -> TorchCudaBackend:
        if REFERENCE not in bundle.manifest.files:
            raise CannotRun(f"{bundle.folder} was exported with --no-reference: {cls.name} needs the weights")
        manifest = bundle.manifest
        return cls(bundle.read(REFERENCE), bundle.config, manifest.flip, manifest.precision, fused_heads=fused_heads)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        [embeddings] = self.stream([images])
        return embeddings

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return self._pipeline.run(batches)

    def buffer(self, images: int, height: int, width: int) -> np.ndarray:
        return self._pipeline.buffer(images)


def _torch_problem() -> str | None:
    import torch

    if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
        return f"the installed torch {torch.__version__} sees no GPU or has no cuDNN (https://pytorch.org/get-started)"
    return None
