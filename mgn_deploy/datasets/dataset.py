"""The one type that every dataset layout is read into."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Subset = Literal["train", "query", "gallery", "multi-query"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)

# Identities of gallery images that are nobody's, as Market-1501 numbers them (Zheng et al. 2015).
JUNK = -1  # ignored when ranking
DISTRACTOR = 0  # a wrong answer to every query


@dataclass(frozen=True)
class LabelledImage:
    """An image file with its identity (`JUNK` and `DISTRACTOR` are nobody's) and the number of its camera."""

    path: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class Dataset:
    """Labelled images of each subset; one that was not asked for is empty.

    `name` is the kind, as in `--data`; `root` is the folder in which the layout was found. `multi_query` are further
    images of the queries' people. `notes` are sentences, one for every count that is not the published one. The people
    of `train` are not those of the other subsets, though they may have the same numbers (MSMT17's do).
    """

    name: str
    root: Path
    train: list[LabelledImage]
    query: list[LabelledImage]
    gallery: list[LabelledImage]
    multi_query: list[LabelledImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls, name: str, root: Path, subsets: Collection[Subset], images: Callable[[Subset], list[LabelledImage]]
    ) -> Dataset:
        """Make a dataset of the wanted subsets, each listed by `images`."""
        train, query, gallery, multi_query = (images(subset) if subset in subsets else [] for subset in SUBSETS)
        return cls(name, root, train, query, gallery, multi_query)

    def images(self, subset: Subset) -> list[LabelledImage]:
        """The images of a subset."""
        return {
            "train": self.train,
            "query": self.query,
            "gallery": self.gallery,
            "multi-query": self.multi_query,
        }[subset]
