"""`stripe_pool_reduce.cu` on a GPU without a compiler at the user's: NVRTC builds the kernels of a problem on first
use, by `cuda-core`, and keeps the machine code on disk.

$XDG_CACHE_HOME/mgn-deploy/kernels/KEY.cubin   machine code of one problem's kernels for one architecture
$XDG_CACHE_HOME/mgn-deploy/kernels/KEY.json    its SHA-256 and the kernels' names in it
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mgn_deploy.cuda.errors import cuda_sentence
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.files import atomic_file, cache_folder
from mgn_deploy.kernels.plan import (
    AUTO,
    FUSED,
    Device,
    Params,
    Plan,
    Pointers,
    Problem,
    fused_launch,
    launches,
    params_of,
    plan_on,
)

FOLDER = Path(__file__).parent
KEPT_ARGUMENTS = 8  # of a planned kernel: a pipeline's sets of buffers, and what an allocator gives in turns
INSTALL = "pip install cuda-core nvidia-cuda-nvrtc"


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
        UserError: it does not compile for that architecture, or the cache folder cannot be written.
    """
    problem = nvrtc_problem()
    if problem:
        raise CannotRun(problem)
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    _, *version = nvrtc.nvrtcVersion()
    source, header = (FOLDER / f"stripe_pool_reduce.{ending}" for ending in ("cu", "h"))
    facts = [*kernels, arch, str(version), source.read_text(), header.read_text()]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    code = _load(key)
    if code is None:
        options = ProgramOptions(
            std="c++17",
            arch=arch,
            include_path=[str(FOLDER)],
            diag_suppress=177,  # functions that these kernels do not call
        )
        try:
            built = Program(source.read_text(), "c++", options).compile("cubin", name_expressions=kernels)
        except Exception as error:  # cuda-core's classes for NVRTC's errors are private
            reason = next((line for line in str(error).splitlines() if "error" in line), str(error).strip())
            raise UserError(
                f"NVRTC {'.'.join(map(str, version))} does not compile the kernels for {arch} ({reason.strip()}): install one that is "
                "as new as the GPU"
            ) from error
        symbols = {name: _text(symbol) for name, symbol in built.symbol_mapping.items()}
        code = MachineCode(bytes(built.code), symbols)
        _save(key, code)
    return code


def nvrtc_problem() -> str | None:
    """Why kernels cannot be compiled here and what to install, or None."""
    try:
        from cuda.bindings import nvrtc

        import_module("cuda.core")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return f"the CUDA kernels are compiled on first use, which needs NVRTC ({error}): {INSTALL}"
    return None


def _text(symbol: bytes | str) -> str:
    return symbol.decode() if isinstance(symbol, bytes) else symbol


def _load(key: str) -> MachineCode | None:
    """None where there is none or it is damaged: then it is compiled again."""
    folder = cache_folder("kernels")
    try:
        record = json.loads((folder / f"{key}.json").read_bytes())
        cubin = (folder / f"{key}.cubin").read_bytes()
        intact = record["sha256"] == hashlib.sha256(cubin).hexdigest()
        return MachineCode(cubin, dict(record["symbols"])) if intact else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(key: str, code: MachineCode) -> None:
    folder = cache_folder("kernels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a writable place") from None
    with atomic_file(folder / f"{key}.cubin") as file:
        file.write(code.cubin)
    with atomic_file(folder / f"{key}.json") as file:
        record = {"sha256": hashlib.sha256(code.cubin).hexdigest(), "symbols": code.symbols}
        file.write(json.dumps(record).encode())


class PlannedKernel:
    """One problem, planned and compiled for a device: `workspace_bytes` says what it needs, `launch` starts it.

    Args:
        problem: of `plan.make_problem`.
        device_id: the GPU, which must be current in the calling thread.

    Raises:
        UserError: NVRTC is not installed; or the path fused is asked for where the device has no cooperative launch.
    """

    def __init__(self, problem: Problem, device_id: int = 0) -> None:
        from cuda.bindings import driver
        from cuda.core import Device as CudaDevice

        self.problem = problem
        device = CudaDevice(device_id)
        device.set_current()
        arch, properties = f"sm_{device.arch}", device.properties
        fused, resident = fused_launch(problem), 0
        if properties.cooperative_launch and problem.path in (AUTO, FUSED):
            kernel = _loaded((fused.kernel,), arch, device_id)[fused.kernel]
            resident = kernel.occupancy.max_active_blocks_per_multiprocessor(fused.threads, fused.shared)
        if problem.path == FUSED and not resident:
            raise UserError("this GPU has no cooperative launch, which the path fused needs: use the path auto")
        major, minor = device.compute_capability
        self.plan = plan_on(problem, Device(properties.multiprocessor_count, 10 * major + minor, resident))
        own = launches(problem, self.plan)
        self._kernels = _loaded(tuple(one.kernel for one in own), arch, device_id)  # held: the functions are theirs
        self._functions = [(one, driver.CUfunction(int(self._kernels[one.kernel].handle))) for one in own]
        self._arguments = arguments_by_addresses(problem, self.plan)

    @property
    def workspace_bytes(self) -> int:
        """Of device memory, aligned to 16 bytes; its first `plan.BARRIER_BYTES` zero before the first launch."""
        return int(self.plan.workspace_bytes)

    def launch(self, pointers: Pointers, stream: int) -> None:
        """Start it on a stream (the driver's handle). Nothing is allocated: it can be captured in a CUDA graph.

        Raises:
            UserError: the driver refuses.
        """
        from cuda.bindings import driver

        arguments = self._arguments(bytes(pointers))
        for one, function in self._functions:
            where = (*one.grid, one.threads, 1, 1, one.shared, driver.CUstream(stream), ctypes.addressof(arguments))
            if one.cooperative:
                (status,) = driver.cuLaunchCooperativeKernel(function, *where)
            else:
                (status,) = driver.cuLaunchKernel(function, *where, 0)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise UserError(cuda_sentence(status.name) or f"the GPU's driver refused a kernel ({status.name})")


def arguments_by_addresses(problem: Problem, plan: Plan) -> Callable[[bytes], ctypes.Array[Any]]:
    """`bytes(pointers)` -> what the driver takes as the kernels' arguments: an array of one pointer, to their `Params`.

    Making these takes longer than a small problem's kernel, so the last ones are kept. The driver copies them at a launch.
    """

    @lru_cache(maxsize=KEPT_ARGUMENTS)
    def arguments(addresses: bytes) -> ctypes.Array[Any]:
        params = params_of(problem, plan, Pointers.from_buffer_copy(addresses))
        # Pointers hold on to what they point at, which an array of bare addresses would not. cuda-core's own launch()
        # takes no structure by value: https://github.com/NVIDIA/cuda-python/issues/2343
        return (ctypes.POINTER(Params) * 1)(ctypes.pointer(params))

    return arguments


@lru_cache(maxsize=256)
def _loaded(kernels: tuple[str, ...], arch: str, device_id: int) -> dict[str, Any]:
    """`cuda.core.Kernel`s by name, loaded once a device."""
    from cuda.core import ObjectCode

    code = compile_kernels(kernels, arch)
    module = ObjectCode.from_cubin(code.cubin)  # its symbol_mapping takes no str: NVIDIA/cuda-python#2585
    return {name: module.get_kernel(code.symbols[name]) for name in kernels}
