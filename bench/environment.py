"""What a measurement depends on beside the code: the machine, its packages, and who else used it meanwhile."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import time
from contextlib import ContextDecorator, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mgn_deploy.cuda.device import gpu_problem, this_gpu
from mgn_deploy.cuda.management import nvml
from mgn_deploy.machine import Hardware, cpu_features, cpu_name, this_cpu, usable_cpus

PACKAGES = (
    *("mgn-deploy", "numpy", "pillow", "torch", "torchvision", "openvino", "onnxruntime", "onnxruntime-gpu", "onnx"),
    *("nncf", "tensorrt", "tensorrt-rtx-cu13", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "triton"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "mlcommons-loadgen"),
)
# Above these a row is said to be measured under noise.
OTHERS, STEAL, VARIATION = 0.1, 0.01, 0.05  # CPUs, share of the time, coefficient of variation of the rounds
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_SYSTEM = Path("/sys/devices/system/cpu")
_RAPL = Path("/sys/class/powercap")


class Strict(BaseModel):
    """Of a result's JSON: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Environment(Strict, frozen=True):
    """A machine and its software. `governor` is "unknown" where the system does not tell, as in a virtual machine."""

    hardware: Hardware
    cpus: int  # that this process may use
    cores: int  # of the machine
    memory_bytes: int
    governor: str
    virtual: bool  # a hypervisor lies below: clocks, energy and neighbours are then hidden
    system: str
    python: str
    packages: dict[str, str]
    git_commit: str | None  # of the source tree that was run, with "+" and its changes' hash; None of an installed one


def environment() -> Environment:
    """Describe this machine, its GPU where the driver shows one, and the versions of what is installed."""
    hardware = this_cpu()
    if gpu_problem() is None:
        with suppress(Exception):  # cuda-core is not installed: the CPU is described all the same
            hardware = this_gpu().hardware()
    packages = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Environment(
        hardware=hardware, cpus=usable_cpus(), cores=os.cpu_count() or 1, memory_bytes=pages,
        governor=_read(_SYSTEM / "cpu0/cpufreq/scaling_governor") or "unknown",
        virtual=" hypervisor" in _read(Path("/proc/cpuinfo")),
        system=platform.platform(), python=platform.python_version(), packages=packages, git_commit=_commit(),
    )  # fmt: skip


def cpu() -> str:
    """Name the CPU, how many of its cores are used, and its instruction sets."""
    return f"{cpu_name()}, {usable_cpus()} CPUs ({' '.join(cpu_features())}), {platform.system()} {platform.machine()}"


def sentence(error: BaseException) -> str:
    """Say what went wrong in one line of sensible length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _commit() -> str | None:
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # Not tracked: it is installed, in an environment that may lie in a repository of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def counters() -> np.ndarray:
    """What only grows, float64 `[5]`: seconds of the wall, of all CPUs' work, of theft by other guests and of our own
    work; how often the CPU was throttled."""
    fields = [int(field) / _TICKS for field in _read(Path("/proc/stat")).partition("\n")[0].split()[1:9]]
    user, nice, kernel, _, _, interrupts, soft, steal = fields or [0.0] * 8
    throttles = [_read(path) or "0" for path in _SYSTEM.glob("cpu*/thermal_throttle/core_throttle_count")]
    busy = user + nice + kernel + interrupts + soft
    return np.array([time.perf_counter(), busy, steal, sum(os.times()[:4]), sum(map(int, throttles))])


class Noise(Strict):
    """Who else used the machine while a row was measured.

    `others` is how many CPUs' time other processes took, `steal` the share of the time that the hypervisor gave to
    other guests, `variation` the standard deviation over the mean of the rounds' images/s, `load` the load average at
    the end. `flags` say in words what was too much; empty: quiet, as far as one can see. `disturbed`: by others, by the
    hypervisor or by the clocks, so that a difference to another run tells nothing of the code.
    """

    others: float = 0.0
    steal: float = 0.0
    variation: float | None = None
    load: float = 0.0
    disturbed: bool = False
    flags: list[str] = []


class Meter(ContextDecorator):
    """Adds up in `grown` what others did while a row was measured, over its slices, by `counters`."""

    def __init__(self) -> None:
        self.grown = np.zeros(5)
        self._clocks: set[str] = set()

    def __enter__(self) -> Meter:
        self._start = counters()
        return self

    def __exit__(self, *_: object) -> None:
        self.grown += counters() - self._start
        self._clocks |= set(gpu.slowed() if (gpu := nvml()) else [])

    def noise(self, variation: float | None) -> Noise:
        wall, busy, steal, own, throttled = self.grown.tolist()
        others = max(0.0, busy - own) / wall if wall else 0.0
        stolen = steal / wall / (os.cpu_count() or 1) if wall else 0.0
        flags = [f"other processes used {others:.2f} CPUs"] if others > OTHERS else []
        flags += [f"the hypervisor took {stolen:.1%} of the time"] if stolen > STEAL else []
        flags += ["the CPU was throttled"] if throttled else []
        flags += [f"the GPU's clocks were held down: {', '.join(sorted(self._clocks))}"] if self._clocks else []
        varies = [f"the rounds vary by {variation:.1%}"] if variation is not None and variation > VARIATION else []
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0
        numbers = {"others": round(others, 3), "steal": round(stolen, 4), "variation": variation, "load": load}
        return Noise(**numbers, disturbed=bool(flags), flags=flags + varies)


class PeakMemory:
    """The peak of this process's memory in a block, in bytes above what it had before; of the GPU's what was added."""

    def __enter__(self) -> PeakMemory:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what there is
        self._gpu = nvml()
        self._host, self._device = _status("VmRSS"), self._gpu.used() if self._gpu else 0
        return self

    def __exit__(self, *_: object) -> None:
        self.host = max(0, _status("VmHWM") - self._host)
        self.device = max(0, self._gpu.used() - self._device) if self._gpu else None


def process_peak() -> int:
    """Bytes of memory that this process had at most since the last `PeakMemory` began."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = _read(Path("/proc/self/status")).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def joules() -> tuple[float, str] | None:
    """Energy counters of GPU and CPU packages in joules and whose they are; None where none can be read."""
    total, sources = 0.0, []
    if (gpu := nvml()) and (energy := gpu.joules()) is not None:
        total, sources = energy, ["GPU"]
    for path in sorted(_RAPL.glob("intel-rapl:[0-9]")):
        with suppress(OSError, ValueError):
            total += int((path / "energy_uj").read_text()) / 1e6
            sources.append(f"CPU {_read(path / 'name')}")
    return (total, " + ".join(sources)) if sources else None
