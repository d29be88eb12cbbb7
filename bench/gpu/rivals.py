"""PyTorch's MGN in several ways, as backends that take turns with the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.torch import TorchBackend
from mgn_deploy.backends.torch_cuda.backend import TorchCudaBackend
from mgn_deploy.backends.torch_cuda.network import DTYPES, InferenceMGN
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.choices import Precision

Way = Literal["eager", "folded", "compiled"]


class TorchRival(TorchBackend):
    """The network in one type: as it was trained ("eager"), with folded batch norms as `torch-cuda` has it but without
    its fused calls, or that compiled for each batch size."""

    def __init__(self, bundle: Bundle, precision: Precision, way: Way) -> None:
        super().__init__(bundle.read(REFERENCE), bundle.config, bundle.manifest.flip)
        torch.backends.cudnn.benchmark = True
        network, dtype = self._embedding, DTYPES[precision]
        run: Any = network.to(dtype) if way == "eager" else InferenceMGN(network.model, network.flip, dtype).eval()
        run = run.to(self._device, memory_format=torch.channels_last)
        if way == "compiled":
            torch._dynamo.config.recompile_limit = 64  # batches x types; beyond its limit it refuses
            mode = "reduce-overhead" if self._device == "cuda" else "default"  # which is CUDA graphs
            run = torch.compile(run, fullgraph=True, dynamic=False, mode=mode)
        self._embedding = run


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
