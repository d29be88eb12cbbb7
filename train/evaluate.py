"""A model's accuracy by the Market-1501 protocol, straight from PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.prefetch import batched, in_order
from mgn_deploy.retrieval.ranking import RankingMetrics
from mgn_deploy.retrieval.validate import rank_gallery
from mgn_deploy.train.model import MGN, Embedding


def evaluate_model(model: MGN, data: Dataset, *, flip: bool = True, batch_size: int = 64) -> RankingMetrics:
    """Embed query and gallery on the device where the model is, and rank. Leaves the model in the mode it was in."""
    training = model.training
    device = next(model.parameters()).device
    embedding = Embedding(model, flip).to(device)

    def embed(images: Sequence[LabelledImage]) -> np.ndarray:
        crops = in_order(lambda image: read_crop(image.path, model.config.height, model.config.width), images)
        with torch.inference_mode():
            rows = [
                embedding(torch.from_numpy(np.stack(batch)).to(device)).cpu() for batch in batched(crops, batch_size)
            ]
        return torch.cat(rows).numpy()

    metrics = rank_gallery(data, embed(data.query), embed(data.gallery))
    model.train(training)
    return metrics
