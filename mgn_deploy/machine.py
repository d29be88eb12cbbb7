"""What this machine is, as far as it bears on an engine's speed and on its embeddings."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# Flags of /proc/cpuinfo that change what an engine can do with INT8, BF16, FP16 and FP32.
_INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


class Hardware(BaseModel):
    """What an engine runs on. Two machines with one CPU name may have other instruction sets, and INT8 sums differ by
    them.

    `gpu`, `compute_capability` ("8.6") and `driver` ("580.65.06") are None where no GPU is used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    architecture: str
    instruction_sets: tuple[str, ...]
    gpu: str | None = None
    compute_capability: str | None = None
    driver: str | None = None

    def __str__(self) -> str:
        if self.gpu:
            return f"{self.gpu} (compute capability {self.compute_capability}, driver {self.driver})"
        return f"{self.cpu} ({self.architecture}: {' '.join(self.instruction_sets) or 'instruction sets unknown'})"

    def is_same_device(self, other: Hardware) -> bool:
        """Whether an engine computes the same on both: the same GPU, or the same CPU with the same instruction sets."""
        if self.gpu or other.gpu:
            return (self.gpu, self.compute_capability) == (other.gpu, other.compute_capability)
        return self == other


def this_cpu() -> Hardware:
    """This machine without a GPU."""
    return Hardware(cpu=cpu_name(), architecture=platform.machine(), instruction_sets=tuple(cpu_features()))


def cpu_name() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that matter to inference, as Linux names them; empty where it does not tell."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in _INSTRUCTION_SETS if name in flags]


def usable_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine's under `taskset`, in batch systems and in containers
    with a set of CPUs (`--cpuset-cpus`). A quota of CPU time (`--cpus`) does not show."""
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
