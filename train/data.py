"""Training images, held decoded in memory or read from files, and the P x K batches of the triplet loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mgn_deploy.embedder import Progress, in_order
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images import read_crop
from mgn_deploy.market1501 import LabelledImage


class TrainingSet:
    """Decoded training crops: uint8 `[n, height, width, 3]` in memory, and class indices in the order of identities."""

    def __init__(
        self, images: Sequence[LabelledImage], height: int, width: int, progress: Progress | None = None
    ) -> None:
        """Decode every image.

        Raises:
            UserError: an image cannot be read, or there are fewer than two identities.
        """
        numbers = sorted({image.identity for image in images})
        if len(numbers) < 2:
            raise UserError(f"training needs images of at least two identities; these have {len(numbers)}")
        index = {identity: position for position, identity in enumerate(numbers)}
        self.num_classes = len(numbers)
        self.classes = np.array([index[image.identity] for image in images])
        self.crops = np.empty((len(images), height, width, 3), np.uint8)

        def read(image: LabelledImage) -> np.ndarray:
            try:
                return read_crop(image.path, height, width)
            except UnreadableImage as error:
                raise UserError(f"{str(image.path)!r} cannot be trained on: {error}") from error

        for position, crop in enumerate(in_order(read, images)):
            self.crops[position] = crop
            if progress:
                progress(position + 1, len(images))

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 `[n, height, width, 3]` with the marked ones mirrored, and classes int64 `[n]`."""
        crops = self.crops[indices]
        crops[flips] = crops[flips, :, ::-1]
        return torch.from_numpy(crops), torch.from_numpy(self.classes[indices])


class IdentitySampler:
    """Batches of P identities x K images (section 4.1: 16 x 4). An epoch visits every identity once.

    An identity with fewer than K images gives some of them more than once. The last identities of an epoch that do not fill
    a batch are filled up with identities of that epoch's beginning, so every batch has P of them.
    """

    def __init__(self, classes: np.ndarray, identities_per_batch: int = 16, images_per_identity: int = 4) -> None:
        self._members = [np.flatnonzero(classes == number) for number in range(int(classes.max()) + 1)]
        self._p = min(identities_per_batch, len(self._members))
        self._k = images_per_identity

    def __len__(self) -> int:
        """Batches an epoch."""
        return max(1, -(-len(self._members) // self._p))

    def epoch(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The epoch's batches, each int64 `[P * K]` of image indices."""
        order = rng.permutation(len(self._members))
        order = np.concatenate([order, order[: len(self) * self._p - len(order)]])
        for start in range(0, len(order), self._p):
            yield np.concatenate([self._pick(self._members[number], rng) for number in order[start : start + self._p]])

    def _pick(self, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(members) >= self._k:
            return rng.choice(members, self._k, replace=False)
        return np.concatenate([members, rng.choice(members, self._k - len(members))])
