"""What `embed` is asked to embed, from its options."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mgn_deploy.errors import UserError
from mgn_deploy.gallery.boxed import boxed_source
from mgn_deploy.gallery.boxes import PERSON, read_boxes
from mgn_deploy.gallery.sources import Source, open_source, part_of
from mgn_deploy.gallery.video import video_source


def open_inputs(
    places: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    boxes: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (PERSON,),
    min_score: float = 0.0,
    video: str | os.PathLike[str] | None = None,
    part: str | None = None,
) -> Source:
    """The images, or boxes in images, that are to be embedded.

    Args:
        places, root: as of `open_source`.
        boxes: a detector's or tracker's file, or a YOLO folder, as `read_boxes` takes it: a row for each box.
        classes, min_score: which boxes are taken, as of `read_boxes`.
        video: one whose boxes are embedded, in place of images.
        part: like 3/16, as of `part_of`.

    Raises:
        UserError: what these functions refuse, or nothing is given.
    """
    taken = None if boxes is None else read_boxes(boxes, classes=classes, min_score=min_score)
    if video is not None:
        if places:
            raise UserError(f"--video {video} is given beside images: embed one after the other into the same store")
        if taken is None:
            raise UserError(f"--video {video}: give a tracker's or detector's boxes in it by --boxes")
        source = video_source(video, taken, root)
    elif places:
        source = open_source(*places, root=root)
        source = source if taken is None else boxed_source(source, taken)
    else:
        raise UserError("no image is given: name a folder, images, a list, or --video and --boxes")
    return source if part is None else part_of(source, part)
