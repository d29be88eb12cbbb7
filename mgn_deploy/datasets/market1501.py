"""Names and folders of the Market-1501 layout (Zheng et al., "Scalable Person Re-identification", ICCV 2015).

DIR/bounding_box_train/0002_c1s1_000451_03.jpg      identity 2, camera 1, sequence 1, frame 451, box 3
DIR/query/..., DIR/bounding_box_test/...            0000 = distractor, -1 = junk
DIR/gt_bbox/...                                     hand-drawn boxes of everybody: the views of multiple-query

DukeMTMC-reID (0005_c2_f0046985.jpg) and CUHK03-NP (0003_c1_22.png) have these folders too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mgn_deploy.datasets.dataset import DISTRACTOR, JUNK, Dataset, LabelledImage, Subset
from mgn_deploy.datasets.roots import find_root
from mgn_deploy.errors import UserError
from mgn_deploy.images.formats import skipped_sentence
from mgn_deploy.images.listing import list_images

FOLDERS: dict[Subset, str] = {
    "train": "bounding_box_train",
    "query": "query",
    "gallery": "bounding_box_test",
    "multi-query": "gt_bbox",
}
LAYOUT = "bounding_box_train, query and bounding_box_test"

_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,4})(?!\d)")


class Label(NamedTuple):
    """What a file name says: a person's number and a camera's."""

    identity: int
    camera: int


def parse_name(name: str) -> Label | None:
    """Read identity and camera from a file name; None where the name is not Market-1501's."""
    match = _NAME.match(name)
    return Label(int(match[1]), int(match[2])) if match else None


def is_market1501(folder: Path) -> bool:
    """Tell whether a folder holds one of the three subsets' folders."""
    return any(os.path.isdir(folder / FOLDERS[subset]) for subset in ("train", "query", "gallery"))


def open_market1501(
    root: str | os.PathLike[str], subsets: Collection[Subset] = ("train", "query", "gallery")
) -> Dataset:
    """List the wanted subsets of a folder in Market-1501 layout, each in the order of its files' names.

    Images of every format that `embed` reads count, those of folders inside a subset's folder too. Identity -1 is junk
    and 0 a distractor; `open_data` says so of Market-1501 alone.

    Raises:
        UserError: no such folder, a wanted subset is missing, empty, or holds an image whose name gives no identity.
    """
    root = find_root(root, is_market1501, LAYOUT)
    notes: list[str] = []
    data = Dataset.read("folder", root, subsets, lambda subset: _labelled(root, FOLDERS[subset], notes))
    return replace(data, notes=notes, junk=frozenset({JUNK}), distractors=frozenset({DISTRACTOR}))


def _labelled(root: Path, name: str, notes: list[str]) -> list[LabelledImage]:
    folder = root / name
    if not os.path.isdir(folder):
        why = f"the Market-1501 layout is {LAYOUT}" if name in LAYOUT else "multiple-query takes its images from there"
        raise UserError(f"{root} has no folder {name!r}: {why}")
    images, listing = [], list_images(folder)
    if listing.skipped:
        notes.append(f"{name}: {skipped_sentence(listing.skipped)}")
    for file in listing:
        path = folder / file.name
        label = parse_name(path.name)
        if label is None:
            raise UserError(
                f"{path}: the name gives no identity and camera; Market-1501's are like 0002_c1s1_000451_03.jpg "
                "(--data identities:DIR reads a folder a person, whatever the files' names)"
            )
        images.append(LabelledImage(path, *label))
    return images
