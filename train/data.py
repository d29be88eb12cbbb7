"""Training batches: decoded and augmented on threads while the network computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mgn_deploy.datasets import LabelledImage
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.prefetch import in_order
from mgn_deploy.train.augment import augment
from mgn_deploy.train.recipe import Augment

BATCHES_AHEAD = 6


class TrainingSet:
    """Labelled images; `classes` are indices in the order of the identities, int64 `[n]`."""

    def __init__(self, images: Sequence[LabelledImage], height: int, width: int, mean: Sequence[float]) -> None:
        """`mean`: of the network's input, fractions, RGB.

        Raises:
            UserError: fewer than two identities.
        """
        numbers = sorted({image.identity for image in images})
        if len(numbers) < 2:
            raise UserError(f"training needs images of at least two identities; these have {len(numbers)}")
        index = {identity: position for position, identity in enumerate(numbers)}
        self.images = list(images)
        self.num_classes = len(numbers)
        self.classes = np.array([index[image.identity] for image in images])
        self._height, self._width = height, width
        self._mean = np.round(np.array(mean) * 255).astype(np.uint8)

    def batches(
        self, chosen: Sequence[np.ndarray], options: Augment, seed: Sequence[int], first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops uint8 `[P * K, height, width, 3]` and classes int64 `[P * K]` of each batch of image indices, from the `first` on.

        Augmentation is a function of `seed` and the batch's number alone.

        Raises:
            UserError: an image cannot be read.
        """
        return in_order(partial(self._load, chosen, options, seed), range(first, len(chosen)), ahead=BATCHES_AHEAD)

    def _load(
        self, chosen: Sequence[np.ndarray], options: Augment, seed: Sequence[int], number: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([*seed, number])
        crops = [augment(self._read(self.images[index]), options, self._mean, rng) for index in chosen[number]]
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(self.classes[chosen[number]])

    def _read(self, image: LabelledImage) -> np.ndarray:
        try:
            return read_crop(image.path, self._height, self._width)
        except UnreadableImage as error:
            raise UserError(f"{str(image.path)!r} cannot be trained on: {error}") from error
