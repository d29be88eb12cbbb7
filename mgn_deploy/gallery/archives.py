"""Tar shards, as WebDataset has them: their images are read by offset, and nothing is unpacked.

A member whose name leads out of the archive (`../a.jpg`, `/a.jpg`) could harm nobody here, and names no sample: it
fails.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.formats import HEAD_BYTES, why_no_image
from mgn_deploy.images.listing import ImageFile

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REPLACED = "members that a later one of the same name replaces"
ReadRange = Callable[[int, int], bytes]
_log = logging.getLogger("mgn_deploy")


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named as a tar archive, compressed or not."""
    return os.fspath(path).lower().endswith((".tar", *COMPRESSED_SUFFIXES))


def archive_of(path: Path) -> Path | None:
    """The archive that a path leads into, as `x.tar/a.jpg` does; None: it is a path like others."""
    return next((folder for folder in path.parents if is_archive(folder) and folder.is_file()), None)


def archive_images(path: Path, name: str, skipped: Counter[str]) -> list[ImageFile]:
    """The images of an archive of this machine, as `images_of` lists them.

    Args:
        path: of the archive.
        name: what it is called below the source.
        skipped: takes the members that are no image, counted by extension.

    Raises:
        UserError: the archive is compressed.
    """
    try:
        with open(path, "rb") as file:
            return images_of(file, str(path), name, partial(_read, path), skipped)
    except OSError as error:
        return [ImageFile(path, name, problem=error.strerror or str(error))]


def images_of(file: BinaryIO, title: str, name: str, read: ReadRange, skipped: Counter[str]) -> list[ImageFile]:
    """The images of an archive, named `shard-000.tar/key.jpg`, in its order; what is broken in it has its `problem`.

    Of members of one name the last counts, as if the archive were unpacked.

    Args:
        file: the archive, whose headers are read.
        title: of the archive, for messages.
        name: what it is called below the source.
        read: gives the bytes of the archive from an offset on, a number of them, when an image is embedded.
        skipped: takes the members that are no image, counted by extension.

    Raises:
        UserError: the archive is compressed: its members have no offset to read them at.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    if kind:
        raise UserError(f"{title} is compressed by {kind}, and members are read by offset: decompress it first")
    found = list(_images(file, size, title, name, read, skipped))
    files = {image.name: image for image in found}
    if len(files) < len(found):
        _log.warning(f"{title}: {len(found) - len(files)} members have the name of a later one, which counts")
        skipped[_REPLACED] += len(found) - len(files)
    return list(files.values())


def _images(
    file: BinaryIO, size: int, title: str, name: str, read: ReadRange, skipped: Counter[str]
) -> Iterator[ImageFile]:
    """The images among the members. A broken header is passed over, block by block, to the next whole one."""
    end = 0  # of the members that were read
    file.seek(0)
    try:
        # `ignore_zeros` goes on after invalid blocks as well as after zeros.
        with tarfile.TarFile(fileobj=file, ignore_zeros=True) as archive:
            while (member := archive.next()) is not None:
                if member.size < 0 or member.offset < end:
                    break
                yield from _lost(name, file, end, member.offset)
                end = archive.offset
                archive.members.clear()  # type: ignore[attr-defined]  # a million of them would stay in memory
                yield from _image(name, file, member, size, read, skipped)
    except (tarfile.TarError, ValueError, OverflowError):
        pass  # what has been read counts; `_lost` names what has not
    yield from _lost(name, file, end, size)
    if end == size:
        _log.warning(f"{title} ends without the blocks that end a tar archive: it may have been cut off")
    if not end:
        yield ImageFile(None, name, problem="not a tar archive" if size else "the archive is empty")


def _image(
    name: str, file: BinaryIO, member: tarfile.TarInfo, size: int, read: ReadRange, skipped: Counter[str]
) -> Iterator[ImageFile]:
    if member.isdir():
        return
    inside = member.name.removeprefix("./")
    if not member.isreg():
        skipped["links in archives" if member.islnk() or member.issym() else "devices in archives"] += 1
        return

    def head() -> bytes:
        file.seek(member.offset_data)
        return file.read(min(HEAD_BYTES, member.size))

    reason = why_no_image(os.path.basename(inside), head)
    if reason is not None:
        skipped[reason] += 1
        return
    problem = None
    if inside.startswith("/") or ".." in inside.split("/"):
        problem = "its name leads out of the archive"
    elif member.offset_data + member.size > size:
        problem = "the archive ends within it"
    elif member.issparse():
        problem = "a sparse member, which is not read by offset"
    mtime = round(member.mtime * 1e9)
    yield ImageFile(
        None,
        f"{name}/{inside}",
        member.size,
        mtime if 0 <= mtime < 2**63 else None,
        problem,
        partial(read, member.offset_data, member.size),
    )


def _lost(name: str, file: BinaryIO, start: int, stop: int) -> Iterator[ImageFile]:
    """A problem where what lies between two members is not all zeros."""
    if not 0 < start < stop:
        return
    file.seek(start)
    parts = (file.read(min(stop - at, 1 << 20)) for at in range(start, stop, 1 << 20))
    if any(part.count(0) < len(part) for part in parts):
        problem = "the archive is broken here: what it had between two members, or at its end, is lost"
        yield ImageFile(None, f"{name}/byte {start}", problem=problem)


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    if len(content) < size:
        raise UnreadableImage("the archive ends within it")
    return content
