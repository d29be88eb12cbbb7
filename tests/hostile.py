"""Files and permissions that commands have to survive."""

from __future__ import annotations

import ctypes
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

# Of a process's sitecustomize.py: its resolver knows numbers alone. The line is there because telemetry's thread may
# swallow the error.
NO_RESOLVER = """
import ipaddress, os, socket
def closed(real):
    def ask(host, *arguments, **options):
        try:
            host and ipaddress.ip_address(host[0] if isinstance(host, tuple) else host)
        except ValueError:
            os.write(2, f"a host was asked for: {host}\\n".encode())
            raise OSError("a host was asked for") from None
        return real(host, *arguments, **options)
    return ask
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, closed(getattr(socket, name)))
"""


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(side: int) -> bytes:
    """A valid grey PNG of side x side zeros, without ever having its pixels in memory."""
    deflate = zlib.compressobj(1)
    row = bytes(side + 1)
    pixels = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


@contextmanager
def permissions_apply() -> Iterator[None]:
    """Let file modes bind this thread although it is root's: takes CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from it."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~0b110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
