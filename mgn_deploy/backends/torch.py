"""PyTorch eager: the reference that every other backend is measured against. Needs the bundle's reference weights."""

from __future__ import annotations

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE
from mgn_deploy.errors import CannotRun
from mgn_deploy.packages import import_problem


def missing() -> str | None:
    return (
        import_problem("torch", "train")
        or import_problem("torchvision", "train")
        or import_problem("safetensors", "train")
    )


def open_engine(bundle: Bundle) -> Backend:
    return TorchBackend(bundle)


class TorchBackend:
    name = "torch"

    def __init__(self, bundle: Bundle) -> None:
        import torch
        from safetensors.torch import load

        from mgn_deploy.train.model import MGN, Embedding

        if REFERENCE not in bundle.manifest.files:
            raise CannotRun(f"{bundle.folder} was exported with --no-reference: the torch backend needs the weights")
        self.version = str(torch.__version__)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.allow_tf32 = False  # the reference is float32; cuDNN would round its inputs to 10 bits
        model = MGN(bundle.config)
        model.load_state_dict(load(bundle.read(REFERENCE)))
        self._embedding = Embedding(model, bundle.manifest.flip).eval().to(self.device)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            rows = torch.from_numpy(np.require(images, requirements="W")).to(self.device)
            return self._embedding(rows).cpu().numpy()
