"""Similarities of labelled pairs of images: of one person (genuine) and of two (impostor)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mgn_deploy.errors import UserError
from mgn_deploy.progress import Progress

_CHUNK = 1 << 13  # pairs whose embeddings are gathered at a time


@dataclass(frozen=True)
class Pairs:
    """Pairs of one kind, the most similar first.

    Attributes:
        similarities: float32 `[n]`, descending.
        first, second: int32 `[n]`; the numbers of the two images' people, from 0 on.
        cameras: int32 `[n, 2]`; the two images' cameras, the lower one first.
        total: how many such pairs the images make, of which `n` were drawn.
    """

    similarities: np.ndarray
    first: np.ndarray
    second: np.ndarray
    cameras: np.ndarray
    total: int

    def __len__(self) -> int:
        return len(self.similarities)

    def where(self, mask: np.ndarray) -> Pairs:
        """Those of the pairs for which `mask`, bool `[n]`, holds, taken for all there are."""
        return Pairs(self.similarities[mask], self.first[mask], self.second[mask], self.cameras[mask], int(mask.sum()))


def genuine_and_impostor(
    embeddings: np.ndarray,
    people: np.ndarray,
    cameras: np.ndarray,
    *,
    same_camera: bool = False,
    max_pairs: int = 2_000_000,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Pairs, Pairs]:
    """The similarities of the pairs of one person and of those of two people.

    Of more than `max_pairs` of a kind that many are drawn at random, each pair with the same chance.

    Args:
        embeddings: unit rows `[n, d]`.
        people: int `[n]`, each image's person, from 0 on.
        cameras: int `[n]`.
        same_camera: also pair images of one camera, which are more alike, above all those of one person that were
            taken within seconds.
        max_pairs: most pairs of each kind; memory grows with it: 24 bytes a pair.
        seed: of the draw.
        progress: called with the pairs done and to do.

    Raises:
        UserError: an embedding is not finite, or there is no pair of one of the kinds.
    """
    if not np.isfinite(embeddings).all():
        broken = np.count_nonzero(~np.isfinite(embeddings).all(axis=1))
        raise UserError(f"{broken} of {len(embeddings)} embeddings are not finite: embed the images again")
    generator = np.random.default_rng(seed)
    made = []
    for step, (pairs, total) in {
        "genuine pairs": _genuine(people, cameras, same_camera),
        "impostor pairs": _impostor(people, cameras, same_camera, max_pairs, generator),
    }.items():
        if len(pairs) > max_pairs:
            pairs = pairs[generator.choice(len(pairs), max_pairs, replace=False)]
        similarities = np.empty(len(pairs), np.float32)
        for start in range(0, len(pairs), _CHUNK):
            first, second = pairs[start : start + _CHUNK].T
            rows = np.einsum("ij,ij->i", embeddings[first], embeddings[second], dtype=np.float32)
            similarities[start : start + _CHUNK] = rows
            if progress:
                progress(step, start + len(first), len(pairs))
        order = np.argsort(-similarities, kind="stable")
        first, second = people[pairs[order]].astype(np.int32).T
        both = np.sort(cameras[pairs[order]], axis=1).astype(np.int32)
        made.append(Pairs(similarities[order], first, second, both, total))
    return made[0], made[1]


def to_means(
    embeddings: np.ndarray,
    people: np.ndarray,
    cameras: np.ndarray,
    images: int,
    *,
    same_camera: bool = False,
    max_pairs: int = 2_000_000,
    seed: int = 0,
) -> tuple[Pairs, Pairs]:
    """The mean similarities of an image to several of one person, its own (genuine) or another (impostor).

    For the images of each camera, `images` images of each person who has so many are drawn, by other cameras unless
    `same_camera`; none is compared with itself. The cameras of these `Pairs` are `[n, 0]`.

    Args:
        embeddings, people, cameras, same_camera, seed: as of `genuine_and_impostor`.
        images: of a person, at least 1.
        max_pairs: about the most impostors.
    """
    generator = np.random.default_rng(seed)
    found: tuple[list[np.ndarray], list[np.ndarray]] = [np.empty((3, 0))], [np.empty((3, 0))]
    numbers = np.unique(cameras)
    for camera in numbers:
        asked = generator.permutation(np.flatnonzero((cameras != camera) | same_camera))
        asked = asked[np.argsort(people[asked], kind="stable")]
        owners, starts, counts = np.unique(people[asked], return_index=True, return_counts=True)
        owners, starts = owners[counts >= images], starts[counts >= images]
        if not len(owners):
            continue
        drawn = asked[starts[:, None] + np.arange(images)]
        means = sum(embeddings[drawn[:, one]].astype(np.float32) for one in range(images)) / np.float32(images)
        asking = generator.permutation(np.setdiff1d(np.flatnonzero(cameras == camera), drawn))
        own = np.minimum(np.searchsorted(owners, people[asking]), len(owners) - 1)
        mated = owners[own] == people[asking]
        similarities = np.einsum("ij,ij->i", embeddings[asking[mated]], means[own[mated]], dtype=np.float32)
        found[0].append(np.stack([similarities, people[asking[mated]], people[asking[mated]]]))
        asking = asking[: 1 + max_pairs // (len(numbers) * len(owners))]
        row, column = np.nonzero(people[asking][:, None] != owners)
        found[1].append(np.stack([(embeddings[asking] @ means.T)[row, column], people[asking][row], owners[column]]))
    made = []
    for kind in found:
        similarities, first, second = np.concatenate(kind, axis=1)
        order = np.argsort(-similarities, kind="stable")
        first, second = first[order].astype(np.int32), second[order].astype(np.int32)
        none = np.empty((len(order), 0), np.int32)
        made.append(Pairs(similarities[order].astype(np.float32), first, second, none, len(order)))
    return made[0], made[1]


def count_impostor(people: np.ndarray, cameras: np.ndarray, same_camera: bool) -> int:
    """How many pairs of images of two people there are, by two cameras unless `same_camera`."""
    of_all, of_person = _pairs_within(np.zeros(len(people), np.int64)), _pairs_within(people)
    if same_camera:
        return of_all - of_person
    _, of_both = np.unique(np.stack([people, cameras]), axis=1, return_inverse=True)
    return of_all - of_person - _pairs_within(cameras) + _pairs_within(of_both.reshape(-1))


def _pairs_within(groups: np.ndarray) -> int:
    counts = np.unique(groups, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _genuine(people: np.ndarray, cameras: np.ndarray, same_camera: bool) -> tuple[np.ndarray, int]:
    order = np.argsort(people, kind="stable")
    starts = np.flatnonzero(np.diff(people[order], prepend=-1))
    found = [np.empty((0, 2), np.int32)]
    for images in np.split(order, starts[1:]):
        first, second = np.triu_indices(len(images), 1)
        pairs = np.stack([images[first], images[second]], axis=1)
        if not same_camera:
            pairs = pairs[cameras[pairs[:, 0]] != cameras[pairs[:, 1]]]
        found.append(pairs.astype(np.int32))
    pairs = np.concatenate(found)
    return pairs, len(pairs)


def _impostor(
    people: np.ndarray, cameras: np.ndarray, same_camera: bool, most: int, generator: np.random.Generator
) -> tuple[np.ndarray, int]:
    total = count_impostor(people, cameras, same_camera)
    if total <= most:
        found = [np.empty((0, 2), np.int32)]
        for one in range(len(people) - 1):
            allowed = people[one + 1 :] != people[one]
            if not same_camera:
                allowed &= cameras[one + 1 :] != cameras[one]
            others = one + 1 + np.flatnonzero(allowed)
            found.append(np.stack([np.full(len(others), one), others], axis=1).astype(np.int32))
        return np.concatenate(found), total
    keys = np.empty(0, np.int64)  # of the pairs that were drawn: first * n + second
    while len(keys) < most:
        first, second = generator.integers(len(people), size=(2, most + most // 4))
        allowed = (first < second) & (people[first] != people[second])
        if not same_camera:
            allowed &= cameras[first] != cameras[second]
        keys = np.unique(np.concatenate([keys, first[allowed] * len(people) + second[allowed]]))
    keys = generator.choice(keys, most, replace=False)
    return np.stack(np.divmod(keys, len(people)), axis=1).astype(np.int32), total
