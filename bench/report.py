"""What every result says of the machine that it was measured on, and how a failure is put."""

from __future__ import annotations

import platform
from typing import Any

from mgn_deploy.machine import cpu_features, cpu_name, usable_cpus


def sentence(error: Exception) -> str:
    """Say what went wrong in one line of sensible length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cpu() -> str:
    """Name the CPU, how many of its cores are used, and its instruction sets."""
    return f"{cpu_name()}, {usable_cpus()} CPUs ({' '.join(cpu_features())}), {platform.system()} {platform.machine()}"


def machine() -> dict[str, Any]:
    """Describe the CPU and, where PyTorch sees one, the GPU with what drives it."""
    import torch

    facts: dict[str, Any] = {"cpu": cpu(), "python": platform.python_version(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        return facts
    from mgn_deploy.cuda.device import driver_version

    properties = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvrtc": _nvrtc(),
    }


def _nvrtc() -> str | None:
    try:
        from cuda.bindings import nvrtc
    except ImportError:  # the kernel's contenders say so
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
