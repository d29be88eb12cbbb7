"""PyTorch's MGN in several ways, as backends that take turns with the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgn_deploy.backends.base import Backend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import this_cpu
from mgn_deploy.train.model import MGN, Embedding, fold_batch_norms

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRival(Backend):
    """The MGN in one type, batch norms folded, in 16 bits channels-last; eager, or compiled for each batch size."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: str, compiled: bool) -> None:
        from safetensors.torch import load

        from mgn_deploy.cuda.device import this_gpu

        torch.backends.cudnn.benchmark = True
        self.version = str(torch.__version__)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.hardware = this_gpu().hardware() if self._device == "cuda" else this_cpu()
        model = MGN(bundle.config)
        model.load_state_dict(load(bundle.read(REFERENCE)))
        embedding = _Typed(fold_batch_norms(model.eval()), bundle.manifest.flip, DTYPES[precision]).to(self._device)
        self._run: Any = embedding
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # batches x types; beyond its limit it refuses
            mode = "reduce-overhead" if self._device == "cuda" else "default"  # which is CUDA graphs
            self._run = torch.compile(embedding, fullgraph=True, dynamic=False, mode=mode)

    @classmethod
    def missing(cls) -> str | None:
        return None

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> Backend:
        raise CannotRun("PyTorch runs weights, not a graph")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rows: np.ndarray = self._run(torch.from_numpy(images).to(self._device)).cpu().numpy()
            return rows


class _Typed(Embedding):
    """Pixels, average and norm as in `Embedding`, the network between in its type."""

    def __init__(self, model: MGN, flip: bool, dtype: torch.dtype) -> None:
        self._format = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        self._dtype = dtype
        super().__init__(model.to(dtype).to(memory_format=self._format), flip)

    def normalise(self, images: Tensor) -> Tensor:
        return super().normalise(images).to(self._dtype).contiguous(memory_format=self._format)


def rivals(precisions: tuple[str, ...], compiled: bool) -> dict[str, Callable[[Bundle], Backend]]:
    """By name, how each is opened; `compiled` adds torch.compile in the first precision."""
    ways: dict[str, Callable[[Bundle], Backend]] = {
        f"torch folded {precision}": lambda bundle, precision=precision: TorchRival(bundle, precision, False)  # type: ignore[misc]
        for precision in precisions
    }
    if compiled:
        ways[f"torch.compile {precisions[0]}"] = lambda bundle: TorchRival(bundle, precisions[0], True)
    return ways
