"""`stripe_pool_reduce.cu` on a GPU without a compiler at the user's: NVRTC compiles the kernels of a problem on first
use, by `cuda-core`, and the machine code of one problem's kernels for one architecture is kept on disk
(`mgn_deploy/cached.py`).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from mgn_deploy.cached import load_entry, save_entry
from mgn_deploy.cuda.errors import cuda_sentence
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.files import sha256_bytes
from mgn_deploy.kernels.params import Params, Pointers, params_of
from mgn_deploy.kernels.plan import Device, Launch, Plan, Problem, fused_launch, launches, may_be_fused, plan_on

SOURCE = Path(__file__).with_name("stripe_pool_reduce.cu")
KEPT_ARGUMENTS = 8  # of a planned kernel: a pipeline's sets of buffers, and what an allocator gives in turns
UNUSED_FUNCTION = 177  # NVRTC's warning, of functions that the chosen kernels do not call
CUDA_CORE = "1.0"  # the oldest: kernels' attributes and `ProgramOptions` were others before it
INSTALL = f"pip install 'cuda-core>={CUDA_CORE}' nvidia-cuda-nvrtc"

_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class MachineCode:
    """Of some kernels: `symbols` are their names in `cubin`, by their names in C++."""

    cubin: bytes
    symbols: dict[str, str]


def compile_kernels(kernels: tuple[str, ...], arch: str) -> MachineCode:
    """Compile by NVRTC, or take from the cache. Needs no GPU.

    Args:
        kernels: names in C++, such as `mma_kernel<Half>`.
        arch: `sm_90`.

    Raises:
        CannotRun: NVRTC is not installed.
        UserError: it does not compile for that architecture.
    """
    key = sha256_bytes("\0".join([*kernels, arch, _version(), SOURCE.read_text()]).encode())
    found = load_entry("kernels", key, "cubin")
    if found:
        cubin, record = found
        return MachineCode(cubin, record["symbols"])
    code = compile_uncached(kernels, arch)
    save_entry("kernels", key, "cubin", code.cubin, {"symbols": code.symbols})
    return code


def compile_uncached(kernels: tuple[str, ...], arch: str, log: TextIO | None = None) -> MachineCode:
    """Compile as `compile_kernels` does, without the cache.

    Args:
        kernels: names in C++.
        arch: `sm_90`.
        log: gets NVRTC's warnings and what ptxas says of each kernel's registers and stack.

    Raises:
        CannotRun: NVRTC is not installed.
        UserError: it does not compile for that architecture.
    """
    compiler = _version()
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        std="c++17", arch=arch, diag_suppress=UNUSED_FUNCTION, ptxas_options=None if log is None else ["-v"]
    )
    try:
        built = Program(SOURCE.read_text(), "c++", options).compile("cubin", name_expressions=kernels, logs=log)
    except Exception as error:  # cuda-core's classes for NVRTC's errors are private
        reason = next((line for line in str(error).splitlines() if "error" in line), str(error)).strip()
        raise UserError(
            f"NVRTC {compiler} does not compile the kernels for {arch} ({reason}): install one that "
            "is as new as the GPU"
        ) from error
    symbols = {
        name: symbol.decode() if isinstance(symbol, bytes) else symbol for name, symbol in built.symbol_mapping.items()
    }
    return MachineCode(bytes(built.code), symbols)


def _version() -> str:
    """Of NVRTC, as "13.0"; CannotRun where it is not installed."""
    problem = nvrtc_problem()
    if problem:
        raise CannotRun(problem)
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def nvrtc_problem() -> str | None:
    """Say why kernels cannot be compiled here and what to install, or return None."""
    try:
        from cuda.bindings import nvrtc

        import_module("cuda.core")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"the CUDA kernels are compiled on first use, which needs NVRTC ({reason}): {INSTALL}"
    installed = version("cuda-core")
    if int(installed.split(".")[0]) < int(CUDA_CORE.split(".")[0]):
        return f"cuda-core {installed} is older than {CUDA_CORE}, whose interface the CUDA kernels need: {INSTALL}"
    return None


class PlannedKernel:
    """One problem, planned and compiled for a device: `workspace_bytes` says what it needs, `launch` starts it.

    Only the kernels of the path that is taken are compiled.

    Args:
        problem: what to compute.
        device_id: the GPU, which must be current in the calling thread.

    Raises:
        CannotRun: NVRTC is not installed.
        UserError: the kernels do not compile, or the path "fused" is asked for without cooperative launch.
    """

    def __init__(self, problem: Problem, device_id: int = 0) -> None:
        from cuda.bindings import driver
        from cuda.core import Device as CudaDevice

        self.problem = problem
        device = CudaDevice(device_id)
        device.set_current()
        self._device_id, self._arch = device_id, f"sm_{device.arch}"
        properties, resident = device.properties, 0
        if properties.cooperative_launch and may_be_fused(problem):
            fused = fused_launch(problem)
            kernel = _loaded((fused.kernel,), self._arch, device_id)[fused.kernel]
            resident = kernel.occupancy.max_active_blocks_per_multiprocessor(fused.threads, fused.shared)
        if problem.path == "fused" and not resident:
            raise UserError("this GPU has no cooperative launch, which the path fused needs: use the path auto")
        major, minor = device.compute_capability
        (_, newest) = driver.cuDriverGetVersion()
        self._device = Device(properties.multiprocessor_count, 10 * major + minor, resident, newest)
        self._take(plan_on(problem, self._device))

    def _take(self, plan: Plan) -> None:
        from cuda.bindings import driver

        self.plan = plan
        own = launches(self.problem, plan)
        # Held: the functions are theirs.
        self._kernels = _loaded(tuple(one.kernel for one in own), self._arch, self._device_id)
        self._functions = [(_config(one), driver.CUfunction(int(self._kernels[one.kernel].handle))) for one in own]
        self._arguments = arguments_by_addresses(self.problem, plan)

    @property
    def workspace_bytes(self) -> int:
        """Of device memory, aligned to 16 bytes; its first `plan.BARRIER_BYTES` zero before the first launch."""
        return self.plan.workspace_bytes

    def launch(self, pointers: Pointers, stream: int) -> None:
        """Start it on a stream (the driver's handle). Nothing is allocated: it can be captured in a CUDA graph after a
        first launch outside of one.

        What the driver promised may not be had: the blocks that occupancy counted may be another process's (under MPS)
        or a tool's. Where it then refuses the cooperative launch, the path "auto" goes over to three launches for good,
        and where it refuses to overlap these, to plain ones.

        Raises:
            ValueError: an address is missing or off its alignment.
            UserError: the driver refuses.
        """
        from cuda.bindings import driver

        results = driver.CUresult
        status = self._start(pointers, stream)
        too_large = status in (results.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, results.CUDA_ERROR_NOT_SUPPORTED)
        if too_large and self.plan.path == "fused" and self.problem.path == "auto":
            _log.info(f"the driver refuses the cooperative launch of the fused heads ({status.name}): three launches")
            status = self._start_as(replace(self._device, resident_blocks=0), pointers, stream)
        if status in (results.CUDA_ERROR_NOT_SUPPORTED, results.CUDA_ERROR_INVALID_VALUE) and self.plan.overlapped:
            _log.info(f"the driver refuses to overlap the launches of the fused heads ({status.name}): plain ones")
            status = self._start_as(replace(self._device, resident_blocks=0, driver=0), pointers, stream)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise UserError(cuda_sentence(status.name) or f"the GPU's driver refused a kernel ({status.name})")

    def _start_as(self, device: Device, pointers: Pointers, stream: int) -> Any:
        """Start it, from now on, as it is planned for another device."""
        self._device = device
        self._take(plan_on(self.problem, device))
        return self._start(pointers, stream)

    def _start(self, pointers: Pointers, stream: int) -> Any:
        """Start the plan's kernels; the driver's status, of the first that it refuses."""
        from cuda.bindings import driver

        arguments, status = self._arguments(pointers), driver.CUresult.CUDA_SUCCESS
        for config, function in self._functions:
            config.hStream = driver.CUstream(stream)
            (status,) = driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0)
            if status != driver.CUresult.CUDA_SUCCESS:
                break
        return status


def _config(one: Launch) -> Any:
    """A launch as the driver is told it, but for its stream."""
    from cuda.bindings import driver

    attributes = []

    def attribute(name: str) -> Any:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
        return attributes[-1].value

    if one.cooperative:
        attribute("COOPERATIVE").cooperative = 1
    if one.programmatic:
        attribute("PROGRAMMATIC_STREAM_SERIALIZATION").programmaticStreamSerializationAllowed = 1
    if one.cluster > 1:
        cluster = attribute("CLUSTER_DIMENSION").clusterDim
        cluster.x, cluster.y, cluster.z = one.cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = one.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = one.threads, 1, 1
    config.sharedMemBytes = one.shared
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def arguments_by_addresses(problem: Problem, plan: Plan) -> Callable[[Pointers], ctypes.Array[Any]]:
    """Return a function that makes the arguments as the driver takes them: an array of one pointer, to `Params`.

    Making these takes longer than a small problem's kernel, so the last ones are kept. The driver copies them at a
    launch. The function raises ValueError as `params_of` does.
    """

    @lru_cache(maxsize=KEPT_ARGUMENTS)
    def arguments(pointers: Pointers) -> ctypes.Array[Any]:
        params = params_of(problem, plan, pointers)
        # Pointers hold on to what they point at, which an array of bare addresses would not. cuda-core's own launch()
        # takes no structure by value: https://github.com/NVIDIA/cuda-python/issues/2343
        return (ctypes.POINTER(Params) * 1)(ctypes.pointer(params))

    return arguments


@lru_cache(maxsize=256)
def _loaded(kernels: tuple[str, ...], arch: str, device_id: int) -> dict[str, Any]:
    """Return `cuda.core.Kernel`s by name, loaded once a device."""
    from cuda.core import ObjectCode

    code = compile_kernels(kernels, arch)
    module = ObjectCode.from_cubin(code.cubin)  # its symbol_mapping takes no str: NVIDIA/cuda-python#2585
    return {name: module.get_kernel(code.symbols[name]) for name in kernels}
