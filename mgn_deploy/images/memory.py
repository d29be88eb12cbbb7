"""What decoding costs beside time: the memory of large images at once, and libtiff's own words on stderr."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Condition

# Most bytes of pixels that all threads together decode at once. One image of the largest size that is allowed fits.
LIMIT_BYTES = 512 * 2**20
_BYTES_PER_PIXEL = 8  # Pillow's RGB takes 4, its source or resized copy as much again

_changed = Condition()
_in_use = 0


@contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Wait until an image of so many pixels may be decoded beside those that other threads decode."""
    global _in_use
    need = pixels * _BYTES_PER_PIXEL
    with _changed:
        _changed.wait_for(lambda: not _in_use or _in_use + need <= LIMIT_BYTES)
        _in_use += need
    try:
        yield
    finally:
        with _changed:
            _in_use -= need
            _changed.notify_all()


@cache
def silence_libtiff() -> None:
    """Stop libtiff from printing to stderr, where its lines name no file; what Pillow raises names it.

    Only on Linux, where the library that Pillow loaded can be found by its path.
    """
    if sys.platform != "linux":
        return
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libtiff" in line}
    for path in paths:
        library = ctypes.CDLL(path)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)
