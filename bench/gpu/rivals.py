"""PyTorch's MGN in several ways, as backends that take turns with the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

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
from mgn_deploy.train.model import MGN, Embedding

Way = Literal["eager", "folded", "compiled"]


class TorchRival(Backend):
    """The network in one type: as it was trained ("eager"), with folded batch norms as `torch-cuda` has it but without
    its fused calls, or that compiled for each batch size."""

    name = "torch"

    def __init__(self, bundle: Bundle, precision: Precision, way: Way) -> None:
        torch.backends.cudnn.benchmark = True
        self.version = str(torch.__version__)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.hardware = this_gpu().hardware() if self._device == "cuda" else this_cpu()
        model = MGN(bundle.config)
        model.load_state_dict(load(bundle.read(REFERENCE)))
        flip, dtype = bundle.manifest.flip, DTYPES[precision]
        network = Embedding(model, flip).to(dtype) if way == "eager" else InferenceMGN(model, flip, dtype)
        self._run: Any = network.eval().to(self._device).to(memory_format=torch.channels_last)
        if way == "compiled":
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
    """By name, the last word of which is the precision, how each is opened. On a GPU also `torch-cuda` with our kernel
    as its heads, on a CPU without its fused operators: the engine itself is there on a GPU, without the kernel."""
    types: tuple[Precision, ...] = ("fp16", "bf16") if cuda else ("fp32", "bf16")
    kinds: list[tuple[Way, Precision]] = [("eager", "fp16" if cuda else "bf16"), *(("folded", one) for one in types)]
    ways: dict[str, Callable[[Bundle], Backend]] = {
        f"torch {way} {type_}": lambda bundle, way=way, type_=type_: TorchRival(bundle, type_, way)  # type: ignore[misc]
        for way, type_ in kinds
    }
    ways["torch-cuda kernel fp16" if cuda else "torch-cuda unfused fp32"] = lambda bundle: TorchCudaBackend(
        bundle.read(REFERENCE), bundle.config, bundle.manifest.flip, types[0], fused_heads=cuda,
        device="cuda" if cuda else "cpu",
    )  # fmt: skip
    return ways


def compiled(bundle: Bundle) -> Backend:
    """The network by `torch.compile` in float16: it takes up to minutes to open, so it is no contender of all runs."""
    return TorchRival(bundle, "fp16", "compiled")
