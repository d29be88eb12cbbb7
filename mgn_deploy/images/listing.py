"""The images below a folder, in an order that is the same on every machine."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mgn_deploy.errors import UserError
from mgn_deploy.images.formats import MACOS, skipped_sentence, why_not_listed

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class ImageFile:
    """An image to embed: a file, or a box in one.

    Attributes:
        path: where it is; None where `read` gives its bytes.
        name: its path below the source that was listed.
        size: in bytes.
        mtime_ns: its modification time, in ns since 1970.
        problem: why it cannot even be opened, or None.
        read: what gives the file's bytes, where it is no file of this machine.
        box: left, top, width and height of the crop, in pixels; None: the whole image.
        frame, time_s, track: of a box in a video.
    """

    path: Path | None
    name: str
    size: int | None = None
    mtime_ns: int | None = None
    problem: str | None = None
    read: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)
    box: tuple[float, float, float, float] | None = None
    frame: int | None = None
    time_s: float | None = None
    track: int | None = None


@dataclass
class Listing:
    """What is below a folder.

    Attributes:
        files: the images, sorted by the bytes of their names.
        skipped: how many files are no image, by extension.
    """

    files: list[ImageFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[ImageFile]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """List every image below `folder`: files with an image's extension, and others whose first bytes are an image's.

    What is no image is counted by extension and said in one warning; macOS's metadata (`__MACOSX`, `._name.jpg`) is no
    image. Symbolic links are followed; one that leads back to a folder above itself is listed as a problem, as are
    broken links, folders that may not be read and files that are no regular files.

    Raises:
        UserError: the folder does not exist, may not be read, or holds no image file.
    """
    folder = Path(folder)
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be listed ({error.strerror}): give the folder that holds the images"
        ) from None
    listing = Listing()
    listing.files.extend(_walk(folder, listing.skipped))
    skipped = skipped_sentence(listing.skipped)
    if not listing.files:
        raise UserError(f"{str(folder)!r} holds no image" + (f": {skipped}" if skipped else " and no other file"))
    if skipped:
        _log.warning(f"{folder}: {skipped}")
    listing.files.sort(key=lambda file: os.fsencode(file.name))
    return listing


def image_paths(sources: Sequence[str | os.PathLike[str]], skipped: Counter[str] | None = None) -> list[Path]:
    """The files of a list of files and folders; a folder's are those below it, sorted. `skipped` takes the others.

    Raises:
        UserError: a folder that holds no image or cannot be read, or nothing given.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            listing = list_images(source)
            found.extend(file.path for file in listing if file.path)
            (Counter() if skipped is None else skipped).update(listing.skipped)
        else:
            found.append(source)
    if not found:
        raise UserError("no image was given")
    return found


def _walk(root: Path, skipped: Counter[str]) -> Iterator[ImageFile]:
    """The images below `root`, unsorted. No recursion: folders may be nested deeper than Python's stack."""
    waiting: list[tuple[Path, str, tuple[tuple[int, int], ...]]] = [(root, "", ())]
    while waiting:
        folder, prefix, above = waiting.pop()  # `above` are the folders that lead here, to notice loops
        try:
            status = os.stat(folder)
            here = (status.st_dev, status.st_ino)
            if here in above:
                yield ImageFile(folder, prefix.rstrip("/"), problem="a link that leads back to a folder above it")
                continue
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            yield ImageFile(folder, prefix.rstrip("/"), problem=f"folder: {error.strerror}")
            continue
        for entry in found:
            name = prefix + entry.name
            try:
                if entry.is_dir():
                    if entry.name == "__MACOSX":
                        skipped[MACOS] += 1
                    else:
                        waiting.append((folder / entry.name, f"{name}/", (*above, here)))
                    continue
            except OSError as error:
                yield ImageFile(folder / entry.name, name, problem=error.strerror)
                continue
            reason = why_not_listed(entry.path, entry.name)
            if reason is None:
                yield image_file(folder / entry.name, name)
            else:
                skipped[reason] += 1


def image_file(path: Path, name: str) -> ImageFile:
    """The file as `list_images` lists it; what cannot be opened has its `problem`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        link = os.path.islink(path)
        return ImageFile(path, name, problem="a link to a file that does not exist" if link else "no such file")
    except OSError as error:
        return ImageFile(path, name, problem=error.strerror)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return ImageFile(path, name, status.st_size, status.st_mtime_ns, problem)
