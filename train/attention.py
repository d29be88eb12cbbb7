"""Where each branch looks: the strength of its last feature map over the image (the paper's Figure 5)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import image_paths
from mgn_deploy.report.figures import draw_attention
from mgn_deploy.train.model import MGN, Embedding
from mgn_deploy.train.weights import load_weights

MAX_ROWS = 64  # of one figure


def draw_attention_on(
    weights: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    limit: int = 8,
) -> int:
    """Draw where each branch of a weights folder's model looks on images, a row for each image, as a PNG.

    Args:
        weights: the weights folder.
        sources: image files, and folders of them.
        out: the PNG.
        limit: most images to draw, from the first on; at most `MAX_ROWS`.

    Returns:
        How many images it draws.

    Raises:
        CannotRun: matplotlib is not installed.
        UserError: not a weights folder, a limit out of range, or an image that cannot be read.
    """
    if not 1 <= limit <= MAX_ROWS:
        raise UserError(f"--limit {limit}: 1 to {MAX_ROWS} images are drawn")
    model = load_weights(weights)
    config = model.config
    files = image_paths(sources)[:limit]
    try:
        crops = np.stack([read_crop(file, config.height, config.width) for file in files])
    except UnreadableImage as error:
        raise UserError(f"an image cannot be drawn: {error}") from error
    columns = ["global" if stripes == 1 else f"part-{stripes}" for stripes in config.branches]
    draw_attention(crops, attention_maps(model, crops), [file.name for file in files], columns, out)
    return len(files)


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
