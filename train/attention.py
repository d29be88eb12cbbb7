"""Where each branch looks: the strength of its last feature map over the image (the paper's Figure 5)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from mgn_deploy.train.model import MGN, Embedding


def attention_maps(model: MGN, crops: np.ndarray) -> np.ndarray:
    """Compute the L2 norm over the channels of each branch's last map, enlarged to the crop and scaled to 0 to 1.

    Args:
        model: in any mode; it is left in eval mode.
        crops: uint8 RGB `[n, height, width, 3]` of the model's input size.

    Returns:
        float32 `[n, branches, height, width]`.
    """
    embedding = Embedding(model, flip=False)
    size = (model.config.height, model.config.width)
    with torch.inference_mode():
        pixels = embedding.normalise(torch.from_numpy(crops).to(next(model.parameters()).device))
        strengths = [
            F.interpolate(feature_map.norm(dim=1, keepdim=True), size, mode="bilinear", align_corners=False)
            for feature_map in model.feature_maps(pixels)
        ]
        maps = torch.cat(strengths, dim=1)
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        return ((maps - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
