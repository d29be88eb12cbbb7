"""The images below a folder, in an order that is the same on every machine."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mgn_deploy.errors import UserError
from mgn_deploy.images import EXTENSIONS


@dataclass(frozen=True)
class ImageFile:
    """A file to embed. `name` is its path below the listed folder; `problem` says why it cannot even be opened."""

    path: Path
    name: str
    size: int | None = None
    mtime_ns: int | None = None
    problem: str | None = None


def list_images(folder: str | os.PathLike[str]) -> list[ImageFile]:
    """Every file below `folder` whose extension is an image's, sorted by the bytes of its name.

    Symbolic links are followed; one that leads back to a folder above itself is listed as a problem, as are broken links,
    folders that may not be read and files that are no regular files.

    Raises:
        UserError: the folder does not exist, may not be read, or holds no image file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder: give the folder that holds the images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{str(folder)!r} may not be read: permission denied")
    files: list[ImageFile] = []
    _walk(folder, "", (), files)
    if not files:
        raise UserError(f"{str(folder)!r} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return sorted(files, key=lambda file: os.fsencode(file.name))


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], files: list[ImageFile]) -> None:
    """Append what is below `folder`; `above` are the folders that lead here, to notice loops."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            files.append(ImageFile(folder, prefix.rstrip("/"), problem="a link that leads back to a folder above it"))
            return
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        files.append(ImageFile(folder, prefix.rstrip("/"), problem=f"folder: {error.strerror}"))
        return
    for entry in found:
        name = prefix + entry.name
        try:
            if entry.is_dir():
                _walk(folder / entry.name, f"{name}/", (*above, (status.st_dev, status.st_ino)), files)
                continue
        except OSError as error:
            files.append(ImageFile(folder / entry.name, name, problem=error.strerror))
            continue
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            files.append(_image_file(folder / entry.name, name))


def _image_file(path: Path, name: str) -> ImageFile:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ImageFile(path, name, problem="a link to a file that does not exist")
    except OSError as error:
        return ImageFile(path, name, problem=error.strerror)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return ImageFile(path, name, status.st_size, status.st_mtime_ns, problem)
