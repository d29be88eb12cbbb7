"""The one type that every dataset layout is read into."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from mgn_deploy.errors import UserError

Subset = Literal["train", "query", "gallery", "multi-query"]
SUBSETS: tuple[Subset, ...] = get_args(Subset)

# Identities of gallery images that are nobody's in Market-1501 (Zheng et al. 2015). Elsewhere they are a person's
# unless a `Dataset` says otherwise.
JUNK = -1  # ignored when ranking
DISTRACTOR = 0  # a wrong answer to every query

NO_CAMERA = -2  # of an image whose layout names none; a store's UNKNOWN is the same number


@dataclass(frozen=True)
class LabelledImage:
    """An image file with its identity and the number of its camera, `NO_CAMERA` where the layout has none."""

    path: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class Dataset:
    """Labelled images of each subset; one that was not asked for is empty.

    `name` is the kind, as in `--data`; `root` is the folder in which the layout was found. `multi_query` are further
    images of the queries' people. `notes` are sentences, one for every count that is not the published one and for
    whatever was left out. The people of `train` are not those of the other subsets, though they may have the same
    numbers (MSMT17's do).

    `junk` and `distractors` are the identities that name nobody in this data set: junk is ignored when ranking, a
    distractor is a wrong answer to every query. Everywhere else 0 is a person. `people` gives the numbers of people who
    have names. `has_cameras` is False where the layout names no cameras: then every other image of a person is a right
    answer.
    """

    name: str
    root: Path
    train: list[LabelledImage]
    query: list[LabelledImage]
    gallery: list[LabelledImage]
    multi_query: list[LabelledImage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    junk: frozenset[int] = frozenset()
    distractors: frozenset[int] = frozenset()
    people: dict[str, int] = field(default_factory=dict)
    has_cameras: bool = True

    @classmethod
    def read(
        cls, name: str, root: Path, subsets: Collection[Subset], images: Callable[[Subset], list[LabelledImage]]
    ) -> Dataset:
        """Make a dataset of the wanted subsets, each listed by `images`."""
        train, query, gallery, multi_query = (images(subset) if subset in subsets else [] for subset in SUBSETS)
        return cls(name, root, train, query, gallery, multi_query)

    def is_person(self, identity: int) -> bool:
        """Whether the number is a person's, and neither junk nor a distractor."""
        return identity not in self.junk and identity not in self.distractors

    def without_junk(self) -> Dataset:
        """The same without the gallery's junk, which is never ranked."""
        return replace(self, gallery=[image for image in self.gallery if image.identity not in self.junk])

    def sample(self, count: int, seed: int = 0) -> Dataset:
        """Query and gallery of people drawn at random until they have `count` images, and a like share of distractors.

        Raises:
            UserError: count is below 2.
        """
        if count < 2:
            raise UserError(f"a sample of {count} images ranks nothing: take at least 2")
        by_person: dict[int, int] = Counter(image.identity for image in (*self.query, *self.gallery))
        people = sorted(identity for identity in by_person if self.is_person(identity))
        random.Random(seed).shuffle(people)
        taken: set[int] = set()
        images = 0
        while people and images < count:
            taken.add(people.pop())
            images = sum(by_person[identity] for identity in taken)
        others = [image for image in self.gallery if not self.is_person(image.identity)]
        share = len(taken) / max(1, len(taken) + len(people))
        kept = set(random.Random(seed).sample(others, round(share * len(others))))
        return replace(
            self,
            query=[image for image in self.query if image.identity in taken],
            gallery=[image for image in self.gallery if image.identity in taken or image in kept],
        )

    def images(self, subset: Subset) -> list[LabelledImage]:
        """The images of a subset."""
        return getattr(self, subset.replace("-", "_"))
