"""PyTorch eager: the reference that every other backend is measured against. Needs the bundle's reference weights."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend, refuse_fused_heads
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import this_cpu
from mgn_deploy.packages import import_problem


class TorchBackend(Backend):
    """The float32 weights as they were trained, batch norms not folded, on the first GPU that PyTorch sees or on the
    CPU."""

    name = "torch"

    def __init__(self, weights: bytes, config: ModelConfig, flip: bool) -> None:
        import torch

        from mgn_deploy.train.model import Embedding
        from mgn_deploy.train.weights import reference_model

        self.version = str(torch.__version__)
        self.hardware = this_cpu()
        self._device = "cpu"
        if torch.cuda.is_available():
            from mgn_deploy.cuda.device import Gpu

            major, minor = torch.cuda.get_device_capability(0)
            self._device = "cuda"
            self.hardware = Gpu(torch.cuda.get_device_name(0), f"{major}.{minor}").hardware()
        torch.backends.cudnn.allow_tf32 = False  # the reference is float32; cuDNN would round its inputs to 10 bits
        self._embedding = Embedding(reference_model(weights, config), flip).eval().to(self._device)

    @classmethod
    def missing(cls) -> str | None:
        problems = (import_problem(package, "train") for package in ("torch", "torchvision", "safetensors"))
        return next(filter(None, problems), None)

    @classmethod
    def open_graph(cls, graph: bytes, config: ModelConfig, *, fused_heads: bool = False) -> TorchBackend:
        raise CannotRun("the torch backend runs weights, not a graph")

    @classmethod
    def open(cls, bundle: Bundle, *, fused_heads: bool = False) -> TorchBackend:
        refuse_fused_heads(cls.name, fused_heads)
        if REFERENCE not in bundle.manifest.files:
            raise CannotRun(f"{bundle.folder} was exported with --no-reference: the torch backend needs the weights")
        return cls(bundle.read(REFERENCE), bundle.config, bundle.manifest.flip)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            rows = torch.from_numpy(np.require(images, requirements="W")).to(self._device)
            return self._embedding(rows).cpu().numpy()
