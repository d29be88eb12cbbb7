"""Folders and lists of MSMT17 (Wei et al., "Person Transfer GAN", CVPR 2018), version 1 and 2 (faces blurred).

DIR/train or DIR/mask_train_v2, DIR/test or DIR/mask_test_v2
DIR/list_train.txt, list_val.txt, list_query.txt, list_gallery.txt, of lines

0000/0000_000_01_0303morning_0008_0.jpg 0           camera 1, and the list's own number of the person, from 0
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from mgn_deploy.datasets.dataset import Dataset, LabelledImage, Subset
from mgn_deploy.datasets.roots import find_root, list_folder
from mgn_deploy.errors import UserError

LISTS: dict[Subset, tuple[str, ...]] = {
    "train": ("list_train.txt", "list_val.txt"),
    "query": ("list_query.txt",),
    "gallery": ("list_gallery.txt",),
}
LAYOUT = "list_train.txt, list_val.txt, list_query.txt and list_gallery.txt"

_LINE = re.compile(r"((?:[^/]+/)*[^/_]+_[^/_]+_(\d{1,4})_[^/]+) (\d{1,9})")


def open_msmt17(root: str | os.PathLike[str], subsets: Collection[Subset]) -> Dataset:
    """List the wanted subsets (of train, query and gallery), in the lists' order; `train` is list_train and list_val.

    Identities are the lists' plus 1: 0 is a person there, and `DISTRACTOR` here.

    Raises:
        UserError: no such folder; a list or folder is missing, a list empty, a line malformed, a listed image missing.
    """
    root = find_root(root, _is_msmt17, LAYOUT)
    return Dataset.read("msmt17", root, subsets, lambda subset: _labelled(root, subset))


def _is_msmt17(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for names in LISTS.values() for name in names)


def _labelled(root: Path, subset: Subset) -> list[LabelledImage]:
    folder = _image_folder(root, "train" if subset == "train" else "test")
    return [image for name in LISTS[subset] for image in _read_list(root / name, folder)]


def _image_folder(root: Path, part: str) -> Path:
    names = (part, f"mask_{part}_v2")
    folders = [path for path in list_folder(root) if path.name.lower() in names and os.path.isdir(path)]
    if len(folders) != 1:
        found = " and ".join(path.name for path in folders) or "neither"
        raise UserError(
            f"{root} has to hold either {names[0]} (version 1) or {names[1]} (version 2), and holds {found}"
        )
    return folders[0]


def _read_list(path: Path, folder: Path) -> list[LabelledImage]:
    try:
        lines = path.read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): MSMT17 has {LAYOUT}") from None
    images = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"{path}, line {number}: {line!r} is not a file and an identity, "
                "like 0000/0000_000_01_0303morning_0008_0.jpg 0"
            )
        image = LabelledImage(folder / match[1], int(match[3]) + 1, int(match[2]))
        if not os.path.isfile(image.path):
            raise UserError(f"{image.path} is missing: {path.name} lists it in line {number}")
        images.append(image)
    if not images:
        raise UserError(f"{path} lists no image")
    return images
