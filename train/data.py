"""Training batches, decoded and augmented on threads while the network computes."""

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
    """Labelled images; `classes`, int64 `[n]`, are each one's index in the order of the identities' numbers."""

    def __init__(self, images: Sequence[LabelledImage], height: int, width: int, mean: Sequence[float]) -> None:
        """Number the classes.

        Args:
            images: of people, as `prepare` gives them.
            height, width: of the network's input, in pixels.
            mean: of the network's input, RGB on the scale of 0 to 1; erased pixels get it.
        """
        numbers = sorted({image.identity for image in images})
        index = {identity: position for position, identity in enumerate(numbers)}
        self.images = list(images)
        self.num_classes = len(numbers)
        self.classes = np.array([index[image.identity] for image in images])
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
        return in_order(partial(self._load, chosen, options, seed), range(first, len(chosen)), ahead=BATCHES_AHEAD)

    def _load(
        self, chosen: Sequence[np.ndarray], options: Augment, seed: Sequence[int], number: int
    ) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([*seed, number])
        crops = [augment(self._read(index), options, self._mean, rng) for index in chosen[number]]
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(self.classes[chosen[number]])

    def _read(self, index: int) -> np.ndarray:
        try:
            return read_labelled(self.images[index], self._height, self._width)
        except UserError as error:  # it was whole when the run began
            raise UserError(f"{error}; replace it, or delete it and go on with --allow-data-change") from None


def read_labelled(image: LabelledImage, height: int, width: int) -> np.ndarray:
    """Read a dataset's image as `read_crop` does: RGB uint8 `[height, width, 3]`.

    Raises:
        UserError: it cannot be read; unlike a folder's, a dataset's images are all needed.
    """
    try:
        return read_crop(image.path, height, width)
    except UnreadableImage as error:
        raise UserError(f"{str(image.path)!r} cannot be used: {error}") from error
