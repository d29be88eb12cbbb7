"""Where the images of a gallery come from: a folder, files or patterns here, others in files beside this one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mgn_deploy.datasets.labels import Labels
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.archives import archive_images, is_archive
from mgn_deploy.gallery.manifest import folder_uri
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.images.decode import MIN_SIDE, open_rgb, resize_crop
from mgn_deploy.images.formats import skipped_sentence
from mgn_deploy.images.listing import ImageFile, image_file
from mgn_deploy.images.memory import reading
from mgn_deploy.images.prefetch import in_order

if TYPE_CHECKING:
    from mgn_deploy.images.nvimagecodec import NvImageCodec

MOST_FILE_BYTES = 512 * 2**20  # 64 megapixels of 16-bit RGB, uncompressed, are less
MOST_CROP_SIDE = 2000  # pixels: a larger image is a photo with somebody in it


@dataclass(frozen=True)
class Decoded:
    """An image as it comes from its source: uint8 `[height, width, 3]`, or the reason why there is none."""

    file: ImageFile
    pixels: np.ndarray | None = None
    error: str | None = None
    sha256: bytes | None = None  # of the file's content
    unlike_crop: bool = False  # a whole image that is wider than high or larger than MOST_CROP_SIDE


@dataclass
class Source:
    """Images to embed.

    Attributes:
        uri: what their names are below, as a store's manifest keeps it.
        title: for messages.
        files: the images, in the order of their rows.
        skipped: what is there and is no image, counted by kind.
        labels: who is on them, where the source says it.
        whole: names of the images of all parts, where this is one part of a source: `folder` numbers their people.
        complete: whether images that a store holds besides are gone; a choice of files does not tell.
        threads: that decode them; None: `prefetch.decoding_threads()`.
        codec: that decodes photos in place of Pillow.
    """

    uri: str
    title: str
    files: list[ImageFile]
    skipped: Counter[str] = field(default_factory=Counter)
    labels: Labels | None = None
    whole: Sequence[str] = ()
    complete: bool = True
    threads: int | None = None
    codec: NvImageCodec | None = None

    def decode(
        self, files: Sequence[ImageFile], height: int, width: int, profile: Profile | None = None
    ) -> Iterator[Decoded]:
        """Read some of the files, in their order, on threads ahead of the caller; a photo once for its boxes."""
        profile = profile or Profile()
        if self.codec:
            from mgn_deploy.gallery.on_device import decode_on

            yield from decode_on(self.codec, files, height, width, profile, self.threads)
            return
        read = partial(_crops, height=height, width=width, profile=profile)
        for crops in in_order(read, photos_of(files), threads=self.threads):
            yield from crops

    def digests(self, files: Sequence[ImageFile]) -> Iterator[bytes | None]:
        """The SHA-256 of the content that each file's crop is of; None where it cannot be read."""
        for photo, digest in zip(photos_of(files), in_order(_digest, photos_of(files)), strict=True):
            yield from [digest] * len(photo)


def photos_of(files: Sequence[ImageFile]) -> list[list[ImageFile]]:
    """The files, those that are boxes of one photo and follow each other together."""
    return [list(group) for _, group in groupby(files, key=lambda file: file.path or file.read or file.name)]


def files_source(
    paths: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None = None,
    skipped: Counter[str] | None = None,
) -> Source:
    """Single files, and the images in tar archives, whose names are below a root.

    Raises:
        UserError: a file lies outside the root, or there is none.
    """
    if not paths:
        raise UserError(skipped_sentence(skipped or {}) or "no image is given")
    absolute = list(dict.fromkeys(map(os.path.abspath, paths)))  # strings: there may be millions
    base = os.path.abspath(root) if root else common_folder(absolute)
    skipped = Counter() if skipped is None else skipped
    files: list[ImageFile] = []
    for path in absolute:
        name = name_below(path, base)
        if name is None:
            raise UserError(f"{path!r} is not below {base!r}: give --root, the folder that holds all images")
        files.extend(archive_images(Path(path), name, skipped) if is_archive(path) else [image_file(Path(path), name)])
    return Source(folder_uri(base), f"{len(files)} images below {base!r}", files, skipped, complete=False)


def common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that all files are below, by their absolute paths."""
    return os.path.commonpath({os.path.dirname(path) for path in paths})


def name_below(path: str, folder: str) -> str | None:
    """A file's path below a folder, with slashes, both absolute; None where it is not below it."""
    start = folder.rstrip(os.sep) + os.sep
    return path[len(start) :].replace(os.sep, "/") if path.startswith(start) and len(path) > len(start) else None


def _crops(files: Sequence[ImageFile], height: int, width: int, profile: Profile) -> list[Decoded]:
    """The crops of one photo's files."""
    with ExitStack() as held:
        held.enter_context(reading(files[0].size or 0))
        try:
            with profile.on_thread("read"):
                content = file_bytes(files[0])
                digest = hashlib.sha256(content).digest()
            with profile.on_thread("decode"):
                image = held.enter_context(open_rgb(content))
        except UnreadableImage as problem:
            error = str(problem).encode("utf-8", "backslashreplace").decode()  # as Parquet keeps it
            return [Decoded(file, error=error) for file in files]
        with profile.on_thread("resize"):
            return [crop_of(file, image, height, width, digest) for file in files]


def _digest(files: Sequence[ImageFile]) -> bytes | None:
    try:
        return hashlib.sha256(file_bytes(files[0])).digest()
    except UnreadableImage:
        return None


def crop_of(file: ImageFile, image: Image.Image, height: int, width: int, digest: bytes | None) -> Decoded:
    """A file's crop of the photo or frame that it is in; its error where its box is outside."""
    try:
        crop = cut(image, file.box)
    except UnreadableImage as problem:
        return Decoded(file, error=str(problem))
    unlike = is_unlike_crop(file, *image.size)
    return Decoded(file, resize_crop(crop, height, width), sha256=digest, unlike_crop=unlike)


def is_unlike_crop(file: ImageFile, width: int, height: int) -> bool:
    """Whether a whole image is wider than high or larger than any crop of a person."""
    return file.box is None and (width > height or max(width, height) > MOST_CROP_SIDE)


def cut(image: Image.Image, box: tuple[float, float, float, float] | None) -> Image.Image:
    """What a box shows of an upright photo: its edges rounded to whole pixels (a half to the even one) and clipped.

    Args:
        image: the photo or frame.
        box: left, top, width and height in pixels; None: the whole image.

    Raises:
        UnreadableImage: less than 4x4 pixels of it are inside.
    """
    return image if box is None else image.crop(clipped(box, *image.size))


def clipped(box: tuple[float, float, float, float] | None, width: int, height: int) -> tuple[int, int, int, int]:
    """The left, top, right and bottom edge of `cut` in an image of that size."""
    if box is None:
        return 0, 0, width, height
    left, top, wide, tall = box
    right, bottom = min(round(left + wide), width), min(round(top + tall), height)
    if right - max(round(left), 0) < MIN_SIDE or bottom - max(round(top), 0) < MIN_SIDE:
        raise UnreadableImage(f"the box has less than {MIN_SIDE}x{MIN_SIDE} pixels inside the {width}x{height} image")
    return max(round(left), 0), max(round(top), 0), right, bottom


def file_bytes(file: ImageFile) -> bytes:
    """The content of an image's file.

    Raises:
        UnreadableImage: it cannot be read, is no regular file, or is larger than any image that is taken.
    """
    if file.problem:
        raise UnreadableImage(file.problem)
    if file.read:
        return file.read()
    assert file.path is not None
    try:
        if not file.path.is_file():
            raise UnreadableImage("not a regular file" if os.path.lexists(file.path) else "No such file or directory")
        with open(file.path, "rb") as opened:
            if os.fstat(opened.fileno()).st_size > MOST_FILE_BYTES:
                raise UnreadableImage(f"larger than {MOST_FILE_BYTES >> 20} MiB, which no image of 64 megapixels is")
            return opened.read()
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
