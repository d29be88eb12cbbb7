"""A store's rows -> the crops that were embedded, from the files that they came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mgn_deploy.datasets.labels import Label, Labels
from mgn_deploy.errors import UnreadableImage
from mgn_deploy.gallery.archives import archive_images, archive_of
from mgn_deploy.gallery.frames import frames_of, read_clip, upright
from mgn_deploy.gallery.remote import object_bytes
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.sources import Source, cut, file_bytes
from mgn_deploy.images.decode import load_rgb
from mgn_deploy.images.listing import ImageFile, image_file

if TYPE_CHECKING:
    from mgn_deploy.gallery.store import Store


def crops(store: Store, rows: Iterable[Row]) -> Iterator[tuple[Row, Image.Image | str]]:
    """Each row with its crop, or the reason why there is none; a photo is read once for rows that follow each other.

    Rows of a video are read in one pass where they are in the order of its frames.

    Raises:
        UserError: what reads the store's source is not installed, or a row's name leads out of their folder.
    """
    for (_, is_frame), group in groupby(rows, key=lambda row: (row.file, row.frame is not None)):
        together = list(group)
        pictures: Iterator[tuple[list[Row], Any]]
        if is_frame:
            pictures = frames_of(read_clip(_path(store, together[0])), together, lambda row: row.frame or 0)
        else:
            pictures = iter([(together, _photo(store, together[0]))])
        for some, picture in pictures:
            image = picture if isinstance(picture, (str, Image.Image)) else upright(picture)
            yield from ((row, _cut(image, row)) for row in some)


def row_crop(store: Store, row: Row) -> Image.Image:
    """The crop of one row.

    Raises:
        UnreadableImage: it is gone or cannot be read any more.
        UserError: as of `crops`.
    """
    [(_, image)] = crops(store, [row])
    if isinstance(image, str):
        raise UnreadableImage(image)
    return image


def source_of(store: Store, rows: Sequence[Row]) -> Source:
    """The photos, and boxes in photos, that were rows of a store, to embed them again. Frames of videos are left out.

    Raises:
        UserError: a row's name leads out of the store's source folder.
    """
    files = [
        replace(_file(store, row), name=row.name, box=row.box, track=row.track) for row in rows if row.frame is None
    ]
    labels = {row.name: Label(row.identity, row.camera) for row in rows if row.identity is not None}
    rule = Labels("none", rule=labels.get)  # none for the rows that stayed: they keep theirs
    return Source(store.manifest.source, f"{store.folder}", files, labels=rule, complete=False)


def sequence_of(row: Row) -> str:
    """The video, or the folder of photos, whose tracks a row's track is one of."""
    return row.file if row.frame is not None else row.file.rpartition("/")[0]


def _path(store: Store, row: Row) -> Path:
    """The photo, video or archive member that a row's box is in."""
    return store.path(replace(row, name=row.file))


def _photo(store: Store, row: Row) -> Image.Image | str:
    try:
        return load_rgb(file_bytes(_file(store, row)))
    except UnreadableImage as problem:
        return str(problem)


def _cut(image: Image.Image | str, row: Row) -> Image.Image | str:
    try:
        return image if isinstance(image, str) else cut(image, row.box)
    except UnreadableImage as problem:
        return str(problem)


def _file(store: Store, row: Row) -> ImageFile:
    """A row's photo: a file here, a member of the archive that its path leads into, or an object elsewhere."""
    source = store.manifest.source
    if not source.startswith("file:"):
        return ImageFile(None, row.file, row.size, row.mtime_ns, read=partial(object_bytes, source, row.file))
    path = _path(store, row)
    archive = archive_of(path)
    if archive is None:
        return image_file(path, path.name)
    status = archive.stat()
    name = path.relative_to(archive).as_posix()
    member = _members(archive, status.st_size, status.st_mtime_ns).get(name)
    return member or ImageFile(path, name, problem="no such member of the archive")


@lru_cache(maxsize=16)
def _members(archive: Path, size: int, mtime_ns: int) -> dict[str, ImageFile]:
    """An archive's images by their names in it, until it changes: finding one reads all headers."""
    return {file.name.partition("/")[2]: file for file in archive_images(archive, archive.name, Counter())}
