"""Accuracy of a model in PyTorch by the Market-1501 protocol."""

from __future__ import annotations

import numpy as np
import torch

from mgn_deploy.datasets import Dataset
from mgn_deploy.images.prefetch import batched, in_order
from mgn_deploy.progress import Progress
from mgn_deploy.retrieval.ranking import RankingMetrics
from mgn_deploy.retrieval.validate import rank_gallery
from mgn_deploy.train.data import read_labelled
from mgn_deploy.train.model import MGN, Embedding

BATCH = 64  # images a forward pass


def evaluate_model(model: MGN, data: Dataset, *, progress: Progress | None = None) -> RankingMetrics:
    """Embed query and gallery on the model's device, features of image and mirror averaged (section 4.1), and rank.

    Args:
        model: is left in the mode that it was in.
        data: with query and gallery.
        progress: called as ("evaluating", images done, images) after each pass.

    Raises:
        UserError: an image cannot be read, or no query has a right answer.
    """
    training = model.training
    device = next(model.parameters()).device
    embedding = Embedding(model).to(device)
    images = [*data.query, *data.gallery]
    crops = in_order(lambda image: read_labelled(image, model.config.height, model.config.width), images)
    rows: list[np.ndarray] = []
    try:
        with torch.inference_mode():
            for batch in batched(crops, BATCH):
                rows.extend(embedding(torch.from_numpy(np.stack(batch)).to(device)).cpu().numpy())
                if progress:
                    progress("evaluating", len(rows), len(images))
    finally:
        model.train(training)
    embedded = np.stack(rows)
    return rank_gallery(data, embedded[: len(data.query)], embedded[len(data.query) :])
