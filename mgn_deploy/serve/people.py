"""The enrolled people behind the service: read again only when their folder has changed."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from mgn_deploy.errors import UserError
from mgn_deploy.identity.people import Enrolled, People


class PeopleList:
    """A people folder opened for a long time. Threads may use it together; other processes may write to the folder.

    Attributes:
        folder: to enrol, rename and remove with.

    Raises:
        UserError: what `People.create` refuses.
    """

    def __init__(self, folder: str | os.PathLike[str], bundle_id: str, dim: int) -> None:
        self.folder = People.create(folder, bundle_id, dim)
        self._lock = threading.Lock()
        self._read: tuple[list[tuple[str, int, int]], Enrolled] | None = None

    def load(self) -> Enrolled:
        """Everybody who is enrolled now.

        Raises:
            UserError: a person's file is damaged.
        """
        with self._lock:
            signature = self._signature()
            if self._read is None or self._read[0] != signature:
                self._read = signature, self.folder.load()
            return self._read[1]

    def _signature(self) -> list[tuple[str, int, int]]:
        files = []
        try:
            with os.scandir(self.folder.folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".npz"):
                        with suppress(FileNotFoundError):  # who is removed meanwhile is not there
                            status = entry.stat()
                            files.append((entry.name, status.st_mtime_ns, status.st_size))
        except OSError as error:
            raise UserError(f"{self.folder.folder} cannot be read: {error.strerror}") from None
        return sorted(files)
