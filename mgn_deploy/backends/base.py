"""What a backend is."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mgn_deploy.bundle.bundle import Bundle


class Backend(Protocol):
    """A bundle opened by one engine. Calls are made from one thread at a time.

    An engine that was compiled for its GPU has also a `profile`, the fewest, best and most images a call.
    """

    name: str
    version: str
    device: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 RGB `[n, height, width, 3]`, C-contiguous -> float32 unit rows `[n, dim]`, a new array."""
        ...


class BackendModule(Protocol):
    def missing(self) -> str | None:
        """Why this backend cannot run here and what to install, or None. Imports the engine."""
        ...

    def open_engine(self, bundle: Bundle) -> Backend: ...
