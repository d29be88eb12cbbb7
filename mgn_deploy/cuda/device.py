"""The NVIDIA GPU of this machine, through the driver. Nothing here needs PyTorch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from mgn_deploy.cuda.management import nvml
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import Hardware, this_cpu

DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """A GPU's name, as "NVIDIA H100", and its compute capability, as "9.0"."""

    name: str
    compute_capability: str

    def hardware(self) -> Hardware:
        """This machine with this GPU, for a proof."""
        management = nvml()
        facts = {
            "gpu": self.name,
            "compute_capability": self.compute_capability,
            "driver": management.driver() if management else None,
        }
        return this_cpu().model_copy(update=facts)


def gpu_problem() -> str | None:
    """Why no GPU can be used here, or None."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver or GPU was found ({DRIVER} cannot be loaded)"
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start (cuInit returned error {status})"
    count = ctypes.c_int()
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return "the NVIDIA driver sees no GPU"
    return None


def this_gpu() -> Gpu:
    """The first GPU that the driver shows (CUDA_VISIBLE_DEVICES decides which).

    Raises:
        CannotRun: there is none.
    """
    problem = gpu_problem()
    if problem:
        raise CannotRun(problem)
    from cuda.core import Device

    device = Device(0)
    device.set_current()
    major, minor = device.compute_capability
    return Gpu(device.name, f"{major}.{minor}")
