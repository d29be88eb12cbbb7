"""What this machine is, as far as it bears on speed."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Flags of /proc/cpuinfo that change what an engine can do with INT8, BF16 and FP32.
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def cpu_name() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that matter to inference, as Linux names them; empty where it does not tell."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [feature for feature in _FEATURES if feature in flags]


def place(device: str) -> str:
    """Where an engine runs, as proofs write it down: the CPU, its architecture, and the engine's device."""
    return f"{cpu_name()} ({platform.machine()}, {device})"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
