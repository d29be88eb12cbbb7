"""Writes drawn people as a folder in Market-1501 layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image

from mgn_deploy.datasets.drawn.crop import draw_crop, draw_junk
from mgn_deploy.errors import UserError
from mgn_deploy.progress import Progress

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"


@dataclass(frozen=True)
class DrawnDataset:
    """Where the folder is and how many images and people it holds.

    `gallery` counts every image of bounding_box_test: `junk` (-1) and `distractors` (0000) are among them.
    """

    root: Path
    train: int
    query: int
    gallery: int
    train_identities: int
    test_identities: int
    junk: int
    distractors: int


@dataclass(frozen=True)
class _Shot:
    """One image to draw. `label` is what its name says; `identity` is who is drawn, None for a fragment."""

    folder: str
    label: str
    identity: int | None
    camera: int
    frame: int

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.label}_c{self.camera}s1_{self.frame:06d}_00.jpg"

    def draw(self, seed: int) -> Image.Image:
        if self.identity is None:
            return draw_junk(self.camera, self.frame, seed=seed)
        return draw_crop(self.identity, self.camera, self.frame, seed=seed)


def draw_market1501(
    root: Path,
    *,
    train_identities: int = 150,
    test_identities: int = 60,
    cameras: int = 4,
    images_per_camera: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> DrawnDataset:
    """Draw people into `root`/bounding_box_train, query and bounding_box_test.

    The people of the test set are numbered after those of the training set. Each has one query in each of two
    cameras (in one, where the gallery would otherwise lack an image of another camera). Their other images
    are the gallery, with one distractor (0000) for each of them and one body fragment (-1) for every three.
    Drawn into a temporary folder beside `root` and renamed: an interrupted drawing never passes for whole.

    Args:
        progress: called after each image.

    Raises:
        UserError: `root` holds files already or cannot be written, or a count is out of range.
    """
    root = Path(root)
    if not (train_identities >= 1 and test_identities >= 1 and train_identities + test_identities <= 9999):
        raise UserError(
            f"{train_identities} + {test_identities} people cannot be drawn: "
            "give at least 1 to train on and 1 to test, 9999 in all"
        )
    if not (2 <= cameras <= 9 and 1 <= images_per_camera <= 50):
        raise UserError(
            f"{cameras} cameras with {images_per_camera} images of each person cannot be drawn: "
            "give 2 to 9 cameras and 1 to 50 images"
        )
    if seed < 0:
        raise UserError(f"the seed {seed} is negative: give 0 or more")
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        raise UserError(f"{root} exists and is not an empty folder: remove it or give another one")
    shots = list(_shots(train_identities, test_identities, cameras, images_per_camera))
    target = root.resolve()
    unfinished = target.parent / f".{target.name}.drawing-{os.getpid()}"
    try:
        for folder in (TRAIN, QUERY, GALLERY):
            (unfinished / folder).mkdir(parents=True)
        for done, shot in enumerate(shots, 1):
            shot.draw(seed).save(unfinished / shot.name, quality=90)
            if progress is not None:
                progress("drawing", done, len(shots))
        if target.is_dir():
            target.rmdir()  # empty, and Windows renames onto no folder
        unfinished.rename(target)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return DrawnDataset(
        root=root,
        train=sum(shot.folder == TRAIN for shot in shots),
        query=sum(shot.folder == QUERY for shot in shots),
        gallery=sum(shot.folder == GALLERY for shot in shots),
        train_identities=train_identities,
        test_identities=test_identities,
        junk=sum(shot.label == "-1" for shot in shots),
        distractors=sum(shot.label == "0000" for shot in shots),
    )


def _shots(train_identities: int, test_identities: int, cameras: int, images_per_camera: int) -> Iterator[_Shot]:
    people = train_identities + test_identities
    for identity in range(1, people + 1):
        # Where both queries would empty the gallery of another camera, one query it is.
        asking = 2 if cameras > 2 or images_per_camera > 1 else 1
        query_cameras = {1 + (identity + k * (1 + identity % (cameras - 1))) % cameras for k in range(asking)}
        for camera in range(1, cameras + 1):
            for k in range(images_per_camera):
                is_query = k == 0 and camera in query_cameras
                folder = TRAIN if identity <= train_identities else QUERY if is_query else GALLERY
                yield _Shot(folder, f"{identity:04d}", identity, camera, 100 * identity + k)
    for k in range(test_identities):  # the drawn strangers are numbered after everybody else
        yield _Shot(GALLERY, "0000", people + 1 + k, 1 + k % cameras, 100 * (people + 1 + k))
    for k in range(test_identities // 3):
        yield _Shot(GALLERY, "-1", None, 1 + k % cameras, 100 * (people + 1 + k))


def draw_people(count: int, *, seed: int = 0) -> list[NDArray[numpy.uint8]]:
    """`count` crops in memory, uint8 [height, width, 3]: four cameras' views of each of count / 4 people."""
    return [numpy.asarray(draw_crop(1 + k // 4, 1 + k % 4, k, seed=seed)) for k in range(count)]
