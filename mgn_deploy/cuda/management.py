"""NVIDIA's management library, without a package (docs.nvidia.com/deploy/nvml-api): driver, clocks, energy, memory."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_SLOW = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal", 0x80: "power brake"}


class Management:
    """The library, opened for the first GPU.

    Raises:
        OSError: it is missing (as on Jetson), or it does not open the GPU.
    """

    def __init__(self) -> None:
        self._library: Any = ctypes.CDLL(LIBRARY)
        self._device = ctypes.c_void_p()
        if self._library.nvmlInit_v2() or self._library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)):
            raise OSError("NVML does not open the GPU")

    def driver(self) -> str | None:
        """The driver's version, as "580.65.06"."""
        version = ctypes.create_string_buffer(80)
        return None if self._library.nvmlSystemGetDriverVersion(version, len(version)) else version.value.decode()

    def slowed(self) -> list[str]:
        """Why the clocks are held down."""
        named = "nvmlDeviceGetCurrentClocks{}Reasons"  # of the event, since driver 535; before, of the throttling
        reasons = self._value(named.format("Event")) or self._value(named.format("Throttle")) or 0
        return [words for bit, words in _SLOW.items() if reasons & bit]

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        millijoules = self._value("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def megahertz(self) -> int | None:
        """The clock of the multiprocessors."""
        return self._value("nvmlDeviceGetClockInfo", 1)

    def used(self) -> int:
        """Bytes of memory in use, by all processes."""
        memory = (ctypes.c_ulonglong * 3)()  # total, free, used
        self._library.nvmlDeviceGetMemoryInfo(self._device, memory)
        return memory[2]

    def _value(self, name: str, *before: int) -> int | None:
        value, ask = ctypes.c_ulonglong(), getattr(self._library, name, None)  # None: of another driver's release
        return None if ask is None or ask(self._device, *before, ctypes.byref(value)) else value.value


@cache
def nvml() -> Management | None:
    """The management library of the first GPU, None where there is none."""
    try:
        return Management()
    except OSError:
        return None
