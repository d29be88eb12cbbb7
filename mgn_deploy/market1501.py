"""Names and folders of the Market-1501 layout (Zheng et al., "Scalable Person Re-identification", ICCV 2015).

DIR/bounding_box_train/0002_c1s1_000451_03.jpg      identity 2, camera 1, sequence 1, frame 451, box 3
DIR/query/..., DIR/bounding_box_test/...            0000 = distractor, -1 = junk
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mgn_deploy.errors import UserError

JUNK = -1
DISTRACTOR = 0

_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,4})(?!\d)")


class Label(NamedTuple):
    identity: int
    camera: int


@dataclass(frozen=True)
class LabelledImage:
    path: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class Market1501:
    """The three subsets, each in the order of the files' names."""

    root: Path
    train: list[LabelledImage]
    query: list[LabelledImage]
    gallery: list[LabelledImage]


def parse_name(name: str) -> Label | None:
    """Identity and camera of a file name, or None where the name is not Market-1501's."""
    match = _NAME.match(name)
    return Label(int(match[1]), int(match[2])) if match else None


def open_market1501(
    root: str | os.PathLike[str], subsets: tuple[str, ...] = ("train", "query", "gallery")
) -> Market1501:
    """List the wanted subsets of a folder in Market-1501 layout; the others are left empty.

    Raises:
        UserError: no such folder, a wanted subset is missing, empty, or holds an image whose name gives no identity.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder: give the one that holds bounding_box_train, query and bounding_box_test"
        )
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    return Market1501(
        root,
        **{subset: _labelled(root / folder, root) if subset in subsets else [] for subset, folder in folders.items()},
    )


def _labelled(folder: Path, root: Path) -> list[LabelledImage]:
    if not folder.is_dir():
        raise UserError(
            f"{root} has no folder {folder.name!r}: the Market-1501 layout is bounding_box_train, query, bounding_box_test"
        )
    images = []
    for path in sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name)):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        label = parse_name(path.name)
        if label is None:
            raise UserError(
                f"{path}: the name gives no identity and camera; Market-1501's are like 0002_c1s1_000451_03.jpg"
            )
        images.append(LabelledImage(path, *label))
    if not images:
        raise UserError(f"{folder} holds no .jpg or .png image")
    return images
