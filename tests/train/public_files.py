"""A public checkpoint's file, and how far the imported model is from the network in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mgn_deploy.train.model import Embedding
from mgn_deploy.train.weights import load_weights

GLOBALS_FIRST = (0, 1, 3, 4, 2, 5, 6, 7)  # our features as numbers of the other networks'


torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


def saved(content: object, folder: Path, name: str = "public.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def random_pixels(height: int = 384, width: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)


def worst_difference(
    original: nn.Module, weights: Path, *, flip: bool = False, order: tuple[int, ...] = GLOBALS_FIRST
) -> float:
    """Between the unit embeddings of the imported model and the original's, its features put in our order."""
    model = load_weights(weights)
    pixels = random_pixels(model.config.height, model.config.width)
    with torch.inference_mode():
        found = Embedding(model, flip)(pixels)
        images = pixels.permute(0, 3, 1, 2).float()
        features = original(images) + original(images.flip(3)) if flip else original(images)
    expected = nn.functional.normalize(features.view(2, 8, -1)[:, order].flatten(1))
    assert expected.std() > 0.05
    return float((found - expected).abs().max())
