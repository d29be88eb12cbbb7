"""Training batches, decoded and augmented on threads while the network computes.

Of the augmentation the mirror is the paper's (section 4.1), the rest is of later recipes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mgn_deploy.datasets import LabelledImage
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.train.recipe import Augment

BATCHES_AHEAD = 6
# Random erasing as published (Zhong et al. 2017): share of the area and aspect ratio of the rectangle.
ERASE_AREA = (0.02, 0.4)
ERASE_ASPECT = (0.3, 1 / 0.3)


class TrainingSet:
    """Labelled images; `classes`, int64 `[n]`, are each one's index in the order of the identities' numbers."""

    def __init__(self, images: Sequence[LabelledImage], height: int, width: int, mean: Sequence[float]) -> None:
        """Number the classes.

        Args:
            images: of people, as `prepare` gives them.
            height, width: of the network's input, in pixels.
            mean: of the network's input, RGB on the scale of 0 to 1; erased pixels get it.
        """
        self.images = list(images)
        self.classes = np.unique([image.identity for image in images], return_inverse=True)[1]
        self._height, self._width = height, width
        self._mean = np.round(np.array(mean) * 255).astype(np.uint8)

    def batches(
        self, chosen: Sequence[np.ndarray], options: Augment, seed: Sequence[int], first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the crops, uint8 `[P * K, height, width, 3]`, and classes, int64 `[P * K]`, of each batch.

        Args:
            chosen: image indices of each batch, as `IdentitySampler.epoch` gives them.
            options: of the augmentation.
            seed: what the augmentation depends on, together with the batch's number.
            first: the first batch that is wanted.

        Raises:
            UserError: an image cannot be read.
        """

        def load(number: int) -> tuple[Tensor, Tensor]:
            rng = np.random.default_rng([*seed, number])
            crops = [augment(self._read(index), options, self._mean, rng) for index in chosen[number]]
            return torch.from_numpy(np.stack(crops)), torch.from_numpy(self.classes[chosen[number]])

        return in_order(load, range(first, len(chosen)), ahead=BATCHES_AHEAD)

    def _read(self, index: int) -> np.ndarray:
        try:
            return read_labelled(self.images[index], self._height, self._width)
        except UserError as error:  # it was whole when the run began
            raise UserError(f"{error}; replace it, or delete it and go on with --allow-data-change") from None


def augment(crop: np.ndarray, options: Augment, mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror, pad and crop, and erase a decoded crop.

    Args:
        crop: RGB uint8 `[height, width, 3]`.
        options: how often and how much.
        mean: uint8 `[3]`, what erased rectangles are filled with: zero once normalised.
        rng: gives the same number of values whatever happens.

    Returns:
        A new array of the crop's shape and type.
    """
    mirror, shift, erase, rectangle = rng.random(), rng.random(2), rng.random(), rng.random(4)
    crop = crop[:, ::-1].copy() if mirror < options.flip else crop.copy()
    height, width = crop.shape[:2]
    if options.pad:
        padded = np.zeros((height + 2 * options.pad, width + 2 * options.pad, 3), np.uint8)
        padded[options.pad : options.pad + height, options.pad : options.pad + width] = crop
        top, left = (int(value * (2 * options.pad + 1)) for value in shift)
        crop = padded[top : top + height, left : left + width].copy()
    if erase < options.erase:
        area = height * width * (ERASE_AREA[0] + rectangle[0] * (ERASE_AREA[1] - ERASE_AREA[0]))
        aspect = math.exp(
            math.log(ERASE_ASPECT[0]) + rectangle[1] * (math.log(ERASE_ASPECT[1]) - math.log(ERASE_ASPECT[0]))
        )
        tall, wide = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
        top, left = int(rectangle[2] * (height - tall + 1)), int(rectangle[3] * (width - wide + 1))
        crop[top : top + tall, left : left + wide] = mean
    return crop


def read_labelled(image: LabelledImage, height: int, width: int) -> np.ndarray:
    """Read a dataset's image as `read_crop` does: RGB uint8 `[height, width, 3]`.

    Raises:
        UserError: it cannot be read; unlike a folder's, a dataset's images are all needed.
    """
    try:
        return read_crop(image.path, height, width)
    except UnreadableImage as error:
        raise UserError(f"{str(image.path)!r} cannot be used: {error}") from error
