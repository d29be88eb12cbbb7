"""Locks between processes and threads, which one that dies releases."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgn_deploy.errors import UserError

LOCK = ".lock"  # a folder's lock file; it stays there, as two processes could each lock another file of that name


def lock(descriptor: int, wait_s: float = 0) -> None:
    """Lock an open file or folder until its descriptor is closed.

    Raises:
        BlockingIOError: another descriptor has held the lock for all of `wait_s` seconds.
        OSError: the file system has no locks, or none of folders, as NFS.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


@contextmanager
def locked(folder: Path, busy: str, wait_s: float = 0) -> Iterator[None]:
    """Hold a folder's lock. Each call has a descriptor of its own, so that threads of one process take turns, too.

    Args:
        folder: which is there.
        busy: the error where somebody else holds the lock.
        wait_s: seconds to wait for it.

    Raises:
        UserError: somebody else holds it, or the folder cannot be written or locked.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        try:
            lock(descriptor, wait_s)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be locked: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)
