"""What decoding costs beside time: the memory of large images at once, and libtiff's own words on stderr."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from threading import Condition

# Most bytes of pixels, and most of files, that all threads together have at once. One image of the largest size that is
# allowed fits.
LIMIT_BYTES = 512 * 2**20
_BYTES_PER_PIXEL = 8  # Pillow's RGB takes 4, its source or resized copy as much again


class _Budget:
    """Bytes that threads take and give back."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._in_use = 0

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        """Wait until so many bytes are free, or all."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_use or self._in_use + need <= LIMIT_BYTES)
            self._in_use += need
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= need
                self._changed.notify_all()


_pixels, _files = _Budget(), _Budget()


def decoding(pixels: int) -> AbstractContextManager[None]:
    """Wait until an image of so many pixels may be in memory beside those that other threads have there."""
    return _pixels.hold(pixels * _BYTES_PER_PIXEL)


def reading(size: int) -> AbstractContextManager[None]:
    """Wait until a file of so many bytes may be in memory; `decoding` may be asked for within, not the reverse."""
    return _files.hold(size)


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
        with suppress(AttributeError):  # another library of such a name, as nvImageCodec's libtiff_ext
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)
