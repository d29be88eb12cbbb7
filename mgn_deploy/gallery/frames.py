"""A video's frames, by their numbers.

Frame n is the n-th frame in the order of presentation, from 1, as trackers and MOTChallenge count. A frame is known by
its timestamp, not by counting what the decoder gives: the frames after one that cannot be decoded keep their numbers.
(What a damaged container has lost without a trace nobody can count; a gap between timestamps is told.)
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from mgn_deploy.errors import UserError
from mgn_deploy.packages import require

if TYPE_CHECKING:
    import av

T = TypeVar("T")
_log = logging.getLogger("mgn_deploy")
BROKEN = "the frame cannot be decoded"
_UNNUMBERED = "the video ends or is broken before the frame, and has no timestamps to number frames by"


@dataclass(frozen=True)
class Clip:
    """What a video's packets tell, without decoding them.

    Attributes:
        path: of the file.
        stamps: each frame's timestamp, ascending: frame n has `stamps[n - 1]`; empty where the file has none to trust.
        keys: the timestamps of the frames that decoding can begin at, ascending.
        seconds: of a timestamp's unit.
        frames: how many there are.
        rate: how many a second.
    """

    path: Path
    stamps: tuple[int, ...] = field(repr=False)
    keys: tuple[int, ...] = field(repr=False)
    seconds: float
    frames: int
    rate: float

    def time_of(self, frame: int) -> float:
        """When a frame is shown, in seconds from the first one."""
        if self.stamps:
            return (self.stamps[frame - 1] - self.stamps[0]) * self.seconds
        return (frame - 1) / self.rate if self.rate else 0.0

    def problem_of(self, frame: int) -> str | None:
        """Why there is no such frame; None where there is."""
        return None if 1 <= frame <= self.frames else f"the video has {self.frames} frames"

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Each timestamp's frame."""
        return {stamp: number for number, stamp in enumerate(self.stamps, start=1)}


def read_clip(path: Path) -> Clip:
    """Read a video's packets; a file that has not changed is not read a second time.

    Raises:
        UserError: the file is missing or no video, or PyAV is not installed.
    """
    require("av", "video", "a video is read by PyAV")
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file: give a video")
    status = path.stat()
    return _read_clip(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _read_clip(path: Path, size: int, mtime_ns: int) -> Clip:
    import av

    try:
        with _opened(path) as container:
            stream = container.streams.video[0]
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
            seconds, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
            codec = stream.codec_context.name
        with _opened(path) as container:
            first = next((frame.pts for frame in container.decode(video=0)), None)
    except (av.error.FFmpegError, IndexError) as error:
        why = "it has no video stream" if isinstance(error, IndexError) else str(error.strerror or error)
        raise UserError(f"{str(path)!r} is no video that can be read: {why}") from None
    stamps = [stamp for stamp, _ in packets if stamp is not None]
    # VP8 has packets without a frame; elsewhere a packet is a frame, if each has a timestamp of its own.
    trusted = codec not in ("vp8", "libvpx") and len(set(stamps)) == len(packets) and first in stamps
    ascending = sorted(stamps)
    steps = [after - before for before, after in pairwise(ascending)]
    gaps = sum(step > 1.5 * median(steps) for step in steps)
    if gaps:
        _log.warning(
            f"{path.name}: {gaps} gaps between the times of its frames; frames are counted as a player shows them, so "
            "a file that lost some after its boxes were made has the boxes behind them on other frames"
        )
    keys = sorted(stamp for stamp, is_key in packets if is_key and stamp is not None)
    return Clip(path, tuple(ascending) if trusted else (), tuple(keys), seconds, len(packets), rate)


def read_frames(clip: Clip, numbers: Sequence[int]) -> Iterator[av.VideoFrame | str]:
    """Some frames of a video, by their ascending numbers from 1; in place of one that is broken, why.

    Decoding begins at the last key frame before the first of them and ends with the last. What follows a broken frame,
    up to the next key frame, may be made of it and counts as broken.
    """
    begin = 1
    if numbers and clip.stamps:
        key = bisect_right(clip.keys, clip.stamps[numbers[0] - 1]) - 1
        begin = clip.numbers[clip.keys[key]] if key > 0 else 1
    wanted = deque(numbers)
    for number, picture in _from(clip, begin):
        while wanted and wanted[0] < number:
            wanted.popleft()
            yield BROKEN
        if wanted and wanted[0] == number:
            wanted.popleft()
            yield picture
        if not wanted:
            return
    yield from [BROKEN if clip.stamps else _UNNUMBERED] * len(wanted)


def frames_of(
    clip: Clip, items: Sequence[T], number_of: Callable[[T], int]
) -> Iterator[tuple[list[T], av.VideoFrame | str]]:
    """The items of each frame, and the frame or why there is none; where their order goes back in time, the video is
    read again."""
    passes: list[list[tuple[int, list[T]]]] = []
    for number, group in groupby(items, key=number_of):
        if not passes or number < passes[-1][-1][0]:
            passes.append([])
        passes[-1].append((number, list(group)))
    for frames in passes:
        pictures = read_frames(clip, [number for number, _ in frames if not clip.problem_of(number)])
        for number, some in frames:
            yield some, clip.problem_of(number) or next(pictures)


def _from(clip: Clip, begin: int) -> Iterator[tuple[int, Any]]:
    """`_numbered`, from the first frame on where the container cannot be sought as exactly as that (MPEG-TS)."""
    frames = _numbered(clip, begin)
    first = next(frames, None)
    if begin > 1 and (first is None or first[0] > begin):
        frames, first = _numbered(clip, 1), None
    if first is not None:
        yield first
    yield from frames


def _numbered(clip: Clip, begin: int) -> Iterator[tuple[int, Any]]:
    """The frames that the decoder gives from `begin` on, by number; in place of one after a broken one, why."""
    import av

    with _opened(clip.path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"err_detect": "explode"}  # no frame that the decoder had to guess at
        if begin > 1:
            container.seek(clip.stamps[begin - 1], stream=stream, backward=True)
        last, spoilt = begin - 1, False
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.FFmpegError:
                    if not clip.stamps:
                        return
                    continue  # its frame is missing among those that come out
                for frame in frames:
                    number = last + 1 if not clip.stamps else clip.numbers.get(frame.pts, 0)
                    if number <= last:
                        continue  # of before the key frame that was sought
                    spoilt = (spoilt or number > last + 1 or frame.is_corrupt) and not frame.key_frame
                    last = number
                    yield number, f"{BROKEN}: one before it is broken" if spoilt else frame
        except av.error.FFmpegError:
            return  # the file ends or is broken here; nothing comes after it


def _opened(path: Path) -> Any:
    """The container of a local file, which may not lead FFmpeg to other files or to the network."""
    import av

    return av.open(str(path), options={"protocol_whitelist": "file"})


def upright(frame: Any) -> Any:
    """A frame as an RGB image, turned as players and OpenCV do where a telephone was held upright."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
