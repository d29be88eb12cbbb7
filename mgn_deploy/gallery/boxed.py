"""Photos and boxes in them -> a source with a row for each box."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.boxes import Box, Boxes
from mgn_deploy.gallery.sources import Source, file_bytes
from mgn_deploy.images.decode import upright_size
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.images.prefetch import in_order

_log = logging.getLogger("mgn_deploy")


def boxed_source(source: Source, boxes: Boxes) -> Source:
    """The boxes of a source's photos, each named `photo.jpg#12` by its track, or by its number in the photo where not
    every box of it has a track of its own.

    A box's photo is looked for by its name below the source, then by the end of its path, with and without extension;
    that of a MOTChallenge box is the one whose name is the frame's number. Boxes are sorted by the bytes of their
    names. Photos without a box and boxes without a photo are counted.

    Raises:
        UserError: no box has its photo in the source.
    """
    find = _photo_of(source.files)
    boxes_of: dict[int, list[Box]] = defaultdict(list)
    missing = []
    for box in boxes.boxes:
        photo = find(box)
        if photo is None:
            missing.append(box)
        else:
            boxes_of[photo].append(box)
    skipped = source.skipped + boxes.skipped
    if missing:
        first = missing[0].photo if missing[0].frame is None else f"frame {missing[0].frame}"
        if not boxes_of:
            raise UserError(
                f"{boxes.title}: not one of its {len(missing):,} boxes is in a photo of {source.title}; the first is "
                f"in {first!r}"
            )
        _log.warning(f"{boxes.title}: {len(missing):,} boxes are in photos that are not given, the first in {first!r}")
        skipped["boxes of photos that are not given"] = len(missing)
    empty = len(source.files) - len(boxes_of)
    if empty:
        _log.warning(f"{empty:,} of {len(source.files):,} photos have no box in {boxes.title}: they give no row")
        skipped["photos without a box"] = empty
    if source.labels:
        _log.warning(f"the labels of {source.title} are of photos, not of the people in them: boxes have none")
    photos = [source.files[index] for index in boxes_of]
    sizes = in_order(_size, photos) if boxes.relative else iter([(1, 1)] * len(photos))
    files = [
        file
        for photo, size, found in zip(photos, sizes, boxes_of.values(), strict=True)
        for file in _files(photo, size, found)
    ]
    files.sort(key=lambda file: os.fsencode(file.name))
    return replace(
        source,
        files=files,
        skipped=skipped,
        labels=None,
        title=f"{len(files):,} boxes of {boxes.title} in {source.title}",
    )


def pixels(edges: Sequence[float], width: float = 1, height: float = 1) -> tuple[float, float, float, float]:
    """A box's left, top, width and height as a store keeps them, scaled by a photo's size: rounded to float32."""
    left, top, box_width, box_height = (
        float(np.float32(v * s)) for v, s in zip(edges, (width, height) * 2, strict=True)
    )
    return left, top, box_width, box_height


def _files(photo: ImageFile, size: tuple[int, int] | str, boxes: Sequence[Box]) -> list[ImageFile]:
    tracks = {box.track for box in boxes}
    by_track = None not in tracks and len(tracks) == len(boxes)
    files = []
    for box in boxes:
        key = box.track if by_track else box.number
        file = replace(photo, name=f"{photo.name}#{key}", track=box.track)
        files.append(
            replace(file, problem=photo.problem or size)
            if isinstance(size, str)
            else replace(file, box=pixels(box.edges, *size))
        )
    return files


def _size(photo: ImageFile) -> tuple[int, int] | str:
    """The photo's upright width and height, or why it cannot be read."""
    try:
        return upright_size(file_bytes(photo))
    except UnreadableImage as problem:
        return str(problem)


def _photo_of(files: Sequence[ImageFile]) -> Callable[[Box], int | None]:
    """What gives the index of a box's photo among the files."""
    names = [file.name for file in files]
    tails = [os.path.basename(name) for name in names]
    by_name = {name: index for index, name in enumerate(names)}
    by_stem, by_tail = _unique(os.path.splitext(name)[0] for name in names), _unique(tails)
    by_tails_stem = _unique(os.path.splitext(tail)[0] for tail in tails)
    by_number = _unique(_number(tail) for tail in tails)

    def find(box: Box) -> int | None:
        if box.photo is None:
            return by_number.get(str(box.frame))
        tail = os.path.basename(box.photo)
        ways = [(by_name, box.photo), (by_stem, box.photo), (by_tail, tail), (by_tails_stem, tail)]
        return next((way[key] for way, key in ways if key in way), by_number.get(box.photo))

    return find


def _unique(keys: Iterable[str]) -> dict[str, int]:
    """The index of each key that is there once."""
    keys = list(keys)
    counts = Counter(keys)
    return {key: index for index, key in enumerate(keys) if counts[key] == 1}


def _number(name: str) -> str:
    """The number that a photo's name is, as frames are named (`000123.jpg`); "" where it is none."""
    stem = os.path.splitext(name)[0]
    return str(int(stem)) if re.fullmatch(r"\d{1,18}", stem, re.ASCII) else ""
