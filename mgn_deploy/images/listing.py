"""The images below a folder, in an order that is the same on every machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import EXTENSIONS


@dataclass(frozen=True)
class ImageFile:
    """A file to embed.

    Attributes:
        path: where it is.
        name: its path below the listed folder.
        size: in bytes.
        mtime_ns: its modification time, in ns since 1970.
        problem: why it cannot even be opened, or None.
    """

    path: Path
    name: str
    size: int | None = None
    mtime_ns: int | None = None
    problem: str | None = None


def list_images(folder: str | os.PathLike[str]) -> list[ImageFile]:
    """List every file below `folder` whose extension is an image's, sorted by the bytes of its name.

    Symbolic links are followed; one that leads back to a folder above itself is listed as a problem, as are broken
    links, folders that may not be read and files that are no regular files.

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
    files = list(_walk(folder))
    if not files:
        raise UserError(f"{str(folder)!r} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return sorted(files, key=lambda file: os.fsencode(file.name))


def _walk(root: Path) -> Iterator[ImageFile]:
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
                    waiting.append((folder / entry.name, f"{name}/", (*above, here)))
                    continue
            except OSError as error:
                yield ImageFile(folder / entry.name, name, problem=error.strerror)
                continue
            if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield _image_file(folder / entry.name, name)


def _image_file(path: Path, name: str) -> ImageFile:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ImageFile(path, name, problem="a link to a file that does not exist")
    except OSError as error:
        return ImageFile(path, name, problem=error.strerror)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return ImageFile(path, name, status.st_size, status.st_mtime_ns, problem)
