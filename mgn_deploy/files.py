"""Writing to disk so that what stands under its final name is whole, and hashing what is read."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from mgn_deploy.errors import UserError
from mgn_deploy.locks import LOCK, lock

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def sha256_bytes(content: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def cache_folder(kind: str) -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/mgn-deploy/KIND`, by default in the user's cache folder.

    It is not created.

    Raises:
        UserError: this user has no home folder, as a container's user without an entry in /etc/passwd has none.
    """
    from platformdirs import user_cache_path

    with suppress(RuntimeError):  # older releases of platformdirs return "~/.cache" as it is instead of raising
        folder = user_cache_path("mgn-deploy")
        if folder.is_absolute():
            return folder / kind
    raise UserError(
        "this user has no home folder to keep a cache in: set XDG_CACHE_HOME to the full path of a writable folder"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets its name only once its whole content is on disk. Of a link what it points to is written.

    Raises:
        UserError: the folder is not writable, the disk is full, or the path is a device or a pipe, which the new file
            would replace; nothing is left behind.
    """
    with _explained(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a device or a pipe: name a file to write")
        path = Path(os.path.realpath(path))
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".mgn-", suffix=".tmp", delete=False)  # noqa: SIM115
        try:
            with file:
                _mark_as_written(file.fileno())
                yield file  # type: ignore[misc]
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
            sync_folder(path.parent)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether a path's bytes are UTF-8, which some formats and libraries need."""
    return os.fsencode(path).decode("utf-8", "replace") == os.fspath(path)


# What reading a damaged zip archive raises, or an encrypted one; `.npz` and PyTorch's files are such archives.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)


def printable(path: str | os.PathLike[str]) -> str:
    """A path as UTF-8 text, as Parquet and JSON keep it: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by `atomic_file`."""
    write_bytes(path, text.encode())


@contextmanager
def atomic_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder that gets its name only once it is whole.

    An earlier folder of that name is replaced if it holds files of these `names` (or patterns, as in "*.plan") and
    nothing else.

    Raises:
        UserError: the path is something else than such a folder, it is not writable, or the disk is full.
    """
    path = Path(os.path.realpath(path))  # a link stays, and leads to the new folder
    with _explained(path):
        own = path.is_dir() and all(any(fnmatchcase(name, one) for one in names) for name in os.listdir(path))
        if path.exists() and not own:
            raise UserError(f"{path} exists and holds what this command did not write: choose another path")
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        new = Path(tempfile.mkdtemp(dir=path.parent, prefix=".mgn-", suffix=".tmp"))
        descriptor = os.open(new, os.O_RDONLY)
        try:
            _mark_as_written(descriptor)
            yield new
            for file in new.rglob("*"):
                sync_folder(file)
            os.chmod(new, 0o777 & ~_umask())
            if path.exists():
                _exchange(new, path)
            else:
                os.replace(new, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # what is left of it, or the folder that it replaced
            os.close(descriptor)


def sync_folder(path: Path) -> None:
    """fsync a file or folder by name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holds_nothing(path: Path) -> bool:
    """Whether it is a folder that is empty but for what a run leaves that is killed before it has written."""
    return path.is_dir() and all(
        name == LOCK or (name.startswith(".mgn-") and name.endswith(".tmp")) for name in os.listdir(path)
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What went wrong with what is written to a path; of another file that was read or written meanwhile, with that."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if isinstance(named, (str, bytes)) and not _is_for(path, Path(os.fsdecode(named))):
            raise UserError(f"{printable(os.fsdecode(named))}: {error.strerror}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: the disk is full ({error.strerror}); free some space and run the same command again"
            ) from error
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_for(path: Path, named: Path) -> bool:
    """Whether a file that an error names is the path, a folder that it is in, or what will become it."""
    return named in (path, *path.parents) or any(part.startswith(".mgn-") for part in named.parts)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: by one system call where the kernel and the file system have it (Linux, not NFS).

    Elsewhere by three renames: a process that is killed between them leaves the earlier folder under a name that begins
    with `.mgn-` and ends with `.old`.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    between = Path(tempfile.mkdtemp(dir=other.parent, prefix=".mgn-", suffix=".old"))
    os.replace(other, between)
    try:
        os.replace(one, other)
    except BaseException:
        os.replace(between, other)
        raise
    os.replace(between, one)


def _mark_as_written(descriptor: int) -> None:
    """Lock a file or folder that is being written, so that nobody takes it for a leftover."""
    with suppress(OSError):  # NFS locks no folder; nor is one removed there, then
        lock(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left an hour ago or earlier; what a run still writes is locked."""
    for left in folder.glob(".mgn-*.tmp"):
        with suppress(OSError):  # of somebody else, being written, or gone already
            if time.time() - left.stat().st_mtime > 3600:
                descriptor = os.open(left, os.O_RDONLY)
                try:
                    lock(descriptor)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
