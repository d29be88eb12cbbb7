"""Host and device buffers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


def split_batch(batch: np.ndarray, max_batch: int) -> list[np.ndarray]:
    """Split a batch into parts of at most `max_batch` rows; an empty batch has none."""
    return [batch[at : at + max_batch] for at in range(0, len(batch), max_batch)]


def array_of(buffer: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """The host memory of a pinned buffer, which must outlive the array."""
    memory = (ctypes.c_uint8 * buffer.size).from_address(int(buffer.handle))
    return np.frombuffer(memory, dtype).reshape(shape)


def part(buffer: Any, size: int) -> Any:
    """The first bytes of a buffer, as a buffer."""
    from cuda.core import Buffer

    return Buffer.from_handle(int(buffer.handle), size, owner=buffer)
