"""CUHK03 (Li et al., "DeepReID", CVPR 2014), split by the new protocol of 767 and 700 people (Zhong et al., CVPR 2017).

DIR/cuhk03_new_protocol_config_labeled.mat          the split: MATLAB 5, of the protocol's authors
DIR/cuhk03_release/cuhk-03.mat or DIR/cuhk-03.mat   the crops: MATLAB 7.3, which is HDF5; needed once
DIR/images_labeled/1_001_1_01.png                   the same crops, extracted: camera pair, person, view, image

or CUHK03-NP, which is the same split in Market-1501 layout. `labeled` are crops of hand-drawn boxes; the names with
`detected` in its stead are those of a detector's boxes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mgn_deploy.datasets.dataset import Dataset, LabelledImage, Subset
from mgn_deploy.datasets.market1501 import is_market1501, open_market1501
from mgn_deploy.datasets.roots import find_root, list_folder
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_folder
from mgn_deploy.packages import require

_log = logging.getLogger("mgn_deploy")

Crops = Literal["labeled", "detected"]

RAW = ("cuhk-03.mat", "cuhk03_release/cuhk-03.mat")
LOG_EVERY = 2000  # crops

_NAME = re.compile(r"\d+_\d+_(\d+)_\d+\.png")


def open_cuhk03(root: str | os.PathLike[str], subsets: Collection[Subset], *, crops: Crops) -> Dataset:
    """List the wanted subsets (of train, query and gallery), in the split's order.

    The crops are extracted from the raw file the first time, which takes minutes.

    Args:
        root: the folder with the split, the one above it or one with it inside; or a folder of CUHK03-NP.
        subsets: those to list; the others are left empty.
        crops: "labeled" for the hand-drawn boxes, "detected" for the detector's.

    Raises:
        UserError: no such folder, no split or crops, a file that cannot be read, a package to read it with missing, or
            as `open_market1501`.
    """
    layout = f"{_config(crops)} (from github.com/zhunzhong07/person-re-ranking) or the {crops} crops of CUHK03-NP"
    root = find_root(root, partial(_is_cuhk03, crops), layout)
    config, folder = root / _config(crops), root / f"images_{crops}"
    if not os.path.isfile(config):
        return open_market1501(root, subsets)
    split = _read_split(config)
    if not os.path.isdir(folder) or not list_folder(folder):
        _extract(root, folder, crops)
    present = {path.name for path in list_folder(folder)}

    def labelled(subset: Subset) -> list[LabelledImage]:
        images = [LabelledImage(folder / name, identity, camera) for name, identity, camera in split[subset]]
        missing = [image.path for image in images if image.path.name not in present]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(images)} {subset} images are not there, {missing[0]} the first: "
                f"remove {folder.name}, and have {RAW[0]} beside it, to extract all crops again"
            )
        return images

    return Dataset.read(f"cuhk03-{crops}", root, subsets, labelled)


def _config(crops: Crops) -> str:
    return f"cuhk03_new_protocol_config_{crops}.mat"


def _is_cuhk03(crops: Crops, folder: Path) -> bool:
    if os.path.isfile(folder / _config(crops)):
        return True
    # CUHK03-NP's two folders are told apart by their names alone: labeled and detected, or cuhk-label and cuhk-detect.
    own, other = ("label", "detect") if crops == "labeled" else ("detect", "label")
    name = Path(os.path.abspath(folder)).name.lower()
    return is_market1501(folder) and (own in name or other not in name)


def _read_split(path: Path) -> dict[Subset, list[tuple[str, int, int]]]:
    """Name, identity and camera of each crop of the subsets."""
    require("scipy", "train", f"{path.name} is read with SciPy")
    import scipy.io

    keys: dict[Subset, str] = {"train": "train_idx", "query": "query_idx", "gallery": "gallery_idx"}
    try:
        content = scipy.io.loadmat(path, squeeze_me=True, variable_names=["filelist", "labels", *keys.values()])
        names = [str(name) for name in np.atleast_1d(content["filelist"])]
        labels = np.atleast_1d(content["labels"]).astype(np.int64)
        indices = {subset: np.atleast_1d(content[key]).astype(np.int64).ravel() - 1 for subset, key in keys.items()}
    except Exception as error:  # SciPy raises whatever its parser comes to
        raise UserError(f"{path} cannot be read as the new protocol's split ({error!r}): get it again") from error
    cameras = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: {name!r} in its file list is not like 1_001_1_01.png")
        cameras.append(int(match[1]))
    if labels.shape != (len(names),) or labels.min(initial=1) < 1:
        raise UserError(f"{path} has {len(names)} files and {labels.size} labels, which have to be one a file, from 1")
    for subset, rows in indices.items():
        if not rows.size or rows.min() < 0 or rows.max() >= len(names):
            raise UserError(f"{path}: {keys[subset]} has to hold numbers from 1 to {len(names)}, of its file list")
    crops = list(zip(names, labels.tolist(), cameras, strict=True))
    return {subset: [crops[index] for index in rows] for subset, rows in indices.items()}


def _extract(root: Path, folder: Path, crops: Crops) -> None:
    source = next((root / name for name in RAW if os.path.isfile(root / name)), None)
    if source is None:
        raise UserError(f"{root} has neither {folder.name} nor {RAW[0]} to extract it from: put one there")
    require("h5py", "train", f"{source.name} is read with h5py")
    _log.info(f"extracting the {crops} crops of {source} to {folder}, which is done once")
    count = 0
    with atomic_folder(folder, ()) as new:
        for name, pixels in _read_crops(source, crops):
            Image.fromarray(pixels).save(new / name)
            count += 1
            if count % LOG_EVERY == 0:
                _log.info(f"{count:,} crops extracted")
        if not count:
            raise UserError(f"{source} holds no {crops} crops")
    _log.info(f"{count:,} crops extracted, all")


def _read_crops(source: Path, crops: Crops) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels, uint8 RGB `[height, width, 3]`, of each crop.

    The file holds references: a cell of the five camera pairs, each a cell `[people, 10]`, the first five of a row
    being view 1. HDF5 has the axes in reverse. Cells of people with fewer images are empty.
    """
    import h5py

    try:
        with h5py.File(source, "r") as file:
            for pair, people in enumerate(file[crops][()].ravel(), 1):
                for person, cells in enumerate(file[people][()].T, 1):
                    for image, cell in enumerate(cells, 1):
                        pixels = file[cell][()].T
                        if pixels.ndim < 3 or not pixels.size:
                            continue
                        if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
                            raise ValueError(f"an image of {pixels.dtype} {list(pixels.shape)}")
                        view = 1 if image <= 5 else 2
                        yield f"{pair}_{person:03d}_{view}_{image:02d}.png", np.ascontiguousarray(pixels)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{source} cannot be read as CUHK03's images ({error}): get it again") from error
