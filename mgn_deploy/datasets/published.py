"""The published sizes of each dataset's subsets, and the sentences where what was found differs.

Sources: the datasets' own pages and papers (Zheng et al. 2015; Zheng et al. 2017 with Ristani et al. 2016; Zhong et al.
2017 for CUHK03's new protocol; Wei et al. 2018).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from mgn_deploy.datasets.dataset import Dataset, LabelledImage, Subset


class Size(NamedTuple):
    """How many images a subset has, junk and distractors included, and of how many people."""

    images: int
    identities: int


# MSMT17's train is its lists train and val together.
PUBLISHED: dict[str, dict[Subset, Size]] = {
    "market1501": {"train": Size(12936, 751), "query": Size(3368, 750), "gallery": Size(19732, 750)},
    "dukemtmc": {"train": Size(16522, 702), "query": Size(2228, 702), "gallery": Size(17661, 1110)},
    "cuhk03-labeled": {"train": Size(7368, 767), "query": Size(1400, 700), "gallery": Size(5328, 700)},
    "cuhk03-detected": {"train": Size(7365, 767), "query": Size(1400, 700), "gallery": Size(5332, 700)},
    "msmt17": {"train": Size(32621, 1041), "query": Size(11659, 3060), "gallery": Size(82161, 3060)},
}


def count_notes(kind: str, data: Dataset, subsets: Collection[Subset]) -> list[str]:
    """Say for each of these subsets whose size is not the published one what it has; a kind without sizes has none."""
    return [
        f"{subset} has {_words(found)}; the published {kind} has {_words(size)}"
        for subset, size in PUBLISHED.get(kind, {}).items()
        if subset in subsets and (found := _size(data.images(subset))) != size
    ]


def _size(images: list[LabelledImage]) -> Size:
    return Size(len(images), len({image.identity for image in images if image.identity > 0}))


def _words(size: Size) -> str:
    return f"{size.images:,} images of {size.identities:,} identities"
