"""PyTorch's MGN in several ways, as backends that take turns with the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.torch_cuda.backend import TorchCudaBackend
from mgn_deploy.backends.torch_cuda.network import DTYPES, InferenceMGN
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.choices import Precision
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.device import this_gpu
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import this_cpu
from mgn_deploy.train.model import MGN


class TorchRival(Backend):
    """The network of `torch-cuda` in one type, without its fused calls: eager, or compiled for each batch size."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: Precision, compiled: bool) -> None:
        torch.backends.cudnn.benchmark = True
        self.version = str(torch.__version__)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.hardware = this_gpu().hardware() if self._device == "cuda" else this_cpu()
        model = MGN(bundle.config)
        model.load_state_dict(load(bundle.read(REFERENCE)))
        self._run: Any = InferenceMGN(model, bundle.manifest.flip, DTYPES[precision]).eval().to(self._device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # batches x types; beyond its limit it refuses
            mode = "reduce-overhead" if self._device == "cuda" else "default"  # which is CUDA graphs
            self._run = torch.compile(self._run, fullgraph=True, dynamic=False, mode=mode)

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


def rivals(cuda: bool) -> dict[str, Callable[[Bundle], Backend]]:
    """By name, the last word of which is the precision, how each is opened. On a CPU also `torch-cuda` without its
    fused operators, which is on a GPU one of the engines."""
    types: tuple[Precision, ...] = ("fp16", "bf16") if cuda else ("fp32", "bf16")
    ways: dict[str, Callable[[Bundle], Backend]] = {
        f"torch folded {type_}": lambda bundle, type_=type_: TorchRival(bundle, type_, False)  # type: ignore[misc]
        for type_ in types
    }
    if cuda:
        ways["torch.compile fp16"] = lambda bundle: TorchRival(bundle, "fp16", True)
    else:
        ways["torch-cuda unfused fp32"] = lambda bundle: TorchCudaBackend(
            bundle.read(REFERENCE), bundle.config, bundle.manifest.flip, "fp32", device="cpu"
        )
    return ways
