"""A video and a tracker's boxes in it, each of which is a row."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mgn_deploy.errors import UserError
from mgn_deploy.files import sha256_file
from mgn_deploy.gallery.boxed import pixels
from mgn_deploy.gallery.boxes import Boxes
from mgn_deploy.gallery.frames import Clip, frames_of, read_clip, upright
from mgn_deploy.gallery.manifest import folder_uri
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.sources import Decoded, Source, crop_of
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.images.prefetch import in_order

FRAMES_AHEAD = 8  # of 4096x2160 pixels: 200 MB


@dataclass
class VideoSource(Source):
    """The boxes of one video."""

    clip: Clip = field(kw_only=True)

    def decode(
        self, files: Sequence[ImageFile], height: int, width: int, profile: Profile | None = None
    ) -> Iterator[Decoded]:
        """The crops of some of the boxes, in their order; where that goes back in time the video is read again."""
        profile = profile or Profile()

        def crops(frame: tuple[list[ImageFile], Any]) -> list[Decoded]:
            boxes, picture = frame
            if isinstance(picture, str):
                return [Decoded(file, error=picture) for file in boxes]
            with profile.on_thread("decode"):
                image = upright(picture)
            with profile.on_thread("resize"):
                return [crop_of(file, image, height, width, digest) for file in boxes]

        if files:
            digest = self._digest
            frames = profile.each("decode video", frames_of(self.clip, files, lambda file: file.frame or 0))
            for some in in_order(crops, frames, FRAMES_AHEAD, self.threads):
                yield from some

    def digests(self, files: Sequence[ImageFile]) -> Iterator[bytes | None]:
        """The SHA-256 of the video's file, for each."""
        if files:
            yield from [self._digest] * len(files)

    @cached_property
    def _digest(self) -> bytes:
        return bytes.fromhex(sha256_file(self.clip.path))


def video_source(path: str | os.PathLike[str], boxes: Boxes, root: str | os.PathLike[str] | None = None) -> Source:
    """The boxes of a video, each a row named `clip.mp4#000123-7` by frame and track, or else `clip.mp4#000123-box2`.

    Args:
        path: a file that PyAV reads.
        boxes: of frames, as MOTChallenge has them or a table with a column frame.
        root: what the names are below; by default the video's folder.

    Raises:
        UserError: the file is missing or no video, PyAV is not installed, or the boxes are of photos.
    """
    path = Path(os.path.abspath(path))
    base = Path(os.path.abspath(root)) if root else path.parent
    if base not in path.parents:
        raise UserError(f"{str(path)!r} is not below {str(base)!r}: give --root, a folder that the video is in")
    if boxes.relative or any(box.frame is None for box in boxes.boxes):
        raise UserError(
            f"{boxes.title} has boxes of photos ({boxes.format}): a video's are MOTChallenge's, or a table's with a "
            "column frame"
        )
    clip = read_clip(path)
    status = path.stat()
    name = path.relative_to(base).as_posix()
    files = []
    tracks: dict[int | None, set[int | None]] = defaultdict(set)
    for box in sorted(boxes.boxes, key=lambda box: box.frame or 0):
        by_track = box.track is not None and box.track not in tracks[box.frame]
        tracks[box.frame].add(box.track)
        key = str(box.track) if by_track else f"box{box.number}"
        frame = box.frame or 0
        problem = clip.problem_of(frame)
        files.append(
            ImageFile(
                path,
                f"{name}#{frame:06d}-{key}",
                status.st_size,
                status.st_mtime_ns,
                problem,
                box=pixels(box.edges),
                frame=frame,
                time_s=None if problem else clip.time_of(frame),
                track=box.track,
            )
        )
    files.sort(key=lambda file: (file.frame, os.fsencode(file.name)))
    return VideoSource(
        uri=folder_uri(base),
        title=f"{len(files):,} boxes of {boxes.title} in {path.name!r}",
        files=files,
        skipped=boxes.skipped,
        complete=False,  # a store may hold several videos of a folder
        clip=clip,
    )
