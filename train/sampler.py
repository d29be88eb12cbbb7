"""P x K batches: the triplet loss needs several images of each of several identities (section 4.1: 16 x 4)."""

from __future__ import annotations

import numpy as np


class IdentitySampler:
    """Draws batches of P identities x K images. Over all ranks, an epoch visits every identity once.

    Each batch is a function of (seed, epoch, rank): nothing has to be saved to go on with a run. An identity with fewer
    than K images gives some of them more than once. Where the identities of an epoch do not fill the last batches of
    every rank, those are filled up with identities of the epoch's beginning.
    """

    def __init__(
        self,
        classes: np.ndarray,
        identities: int = 16,
        images: int = 4,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Choose P, K and this process's part.

        Args:
            classes: class index of each image, int `[n]`, every class from 0 on present.
            identities: P; with fewer classes that many.
            images: K.
            seed: of the batches.
            rank, ranks: of this process, as in `Group`.
        """
        self._members = [np.flatnonzero(classes == number) for number in range(int(classes.max()) + 1)]
        self._p = min(identities, len(self._members))
        self._k = images
        self._seed, self._rank, self._ranks = seed, rank, ranks

    def __len__(self) -> int:
        """Count the batches of an epoch, of each rank."""
        return max(1, -(-len(self._members) // (self._p * self._ranks)))

    def epoch(self, number: int) -> list[np.ndarray]:
        """Draw this rank's batches of an epoch: image indices int64 `[P * K]`, K in a row of one identity."""
        order = np.random.default_rng([self._seed, number]).permutation(len(self._members))
        order = np.resize(order, len(self) * self._p * self._ranks)  # repeats from the beginning
        mine = order.reshape(len(self), self._ranks, self._p)[:, self._rank]
        rng = np.random.default_rng([self._seed, number, self._rank])
        return [np.concatenate([self._pick(self._members[identity], rng) for identity in batch]) for batch in mine]

    def _pick(self, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if len(members) >= self._k:
            return rng.choice(members, self._k, replace=False)
        return np.concatenate([members, rng.choice(members, self._k - len(members))])
