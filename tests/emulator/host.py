"""`stripe_pool_reduce.cu` compiled for the CPU through `host_shim.h`: how its tests run it where there is no GPU.

Slow, as a simulation is: a check of what the kernels compute, not a way to compute it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mgn_deploy.config import Neck, Pooling
from mgn_deploy.kernels import plan
from mgn_deploy.kernels.plan import (
    BARRIER_BYTES,
    DTYPES,
    MAX_BRANCHES,
    OUTPUTS,
    Params,
    Plan,
    Pointers,
    Problem,
    features_of,
    make_problem,
)

SOURCE = Path(plan.__file__).with_name("stripe_pool_reduce.cu")


def build_host(folder: Path, compiler: str = "g++", sanitize: bool = False, source: Path = SOURCE) -> Path:
    """Compile to a shared library in `folder`; with AddressSanitizer and UBSan where asked. `source` is the
    kernels' or, to see what the simulation notices, a copy with a fault in it.

    Raises:
        RuntimeError: the compiler fails, with what it says. A warning is a failure.
    """
    library = folder / ("stripe_pool_reduce_sanitized.so" if sanitize else "stripe_pool_reduce.so")
    how = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else ["-O2"]
    # Jumping between stacks is what the fibers do; a fortified longjmp takes it for an attack.
    always = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-shared",
    ]
    headers = ["-I", str(SOURCE.parent), "-I", str(Path(__file__).parent)]
    command = [compiler, "-x", "c++", *always, *how, *headers, "-DMGN_HOST_SHIM", str(source), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return library


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as `dtype` has them, to nearest even, as float32."""
    return _numbers(_bits(numbers, dtype), dtype)


def _bits(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """As stored: float32, float16, or bfloat16's bits in uint16."""
    exact = np.ascontiguousarray(numbers, np.float32)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return exact.astype(dtype)
    bits = exact.view(np.uint32)
    up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(exact), 0x7FFF, up).astype(np.uint16)


def _numbers(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


class HostKernel:
    """The C API on a simulated device.

    Args:
        library: of `build_host`.
        multiprocessors, capability, cooperative: of the device, as its plans see it.
    """

    def __init__(self, library: Path, multiprocessors: int = 2, capability: int = 90, cooperative: bool = True) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.mgn_spr_error.restype = ctypes.c_char_p
        self.library.shim_allocate.restype = ctypes.c_void_p
        self.library.shim_allocate.argtypes = [ctypes.c_size_t]
        self.library.shim_free.argtypes = [ctypes.c_void_p]
        self._device = (multiprocessors, capability, int(cooperative))

    def plan(self, problem: Problem) -> Plan:
        plan = Plan()
        self.library.shim_device(*self._device)
        self._check(self.library.mgn_spr_plan_for(ctypes.byref(problem), ctypes.byref(plan)))
        return plan

    def params(self, problem: Problem, plan: Plan, pointers: Pointers) -> Params:
        """What the C code tells its kernels."""
        params = Params()
        size = self.library.shim_params(
            ctypes.byref(problem), ctypes.byref(plan), ctypes.byref(pointers), ctypes.byref(params)
        )
        assert size == ctypes.sizeof(Params)
        return params

    def take_launches(self) -> list[tuple[int, ...]]:
        """Grid (3), threads, shared bytes and whether cooperative, of each launch since the last call."""
        numbers = (ctypes.c_int * 600)()
        count = self.library.shim_take_launches(numbers, 100)
        return [tuple(numbers[6 * i : 6 * i + 6]) for i in range(count)]

    def run(
        self,
        maps: Sequence[np.ndarray],
        branches: Sequence[int],
        weight: np.ndarray,
        bias: np.ndarray,
        *,
        dtype: str = "float32",
        layout: str = "nchw",
        pooling: Pooling = "max",
        powers: np.ndarray | None = None,
        neck: Neck = "relu",
        scale: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        output: str = "features",
        path: str = "auto",
        order: int = 0,
    ) -> np.ndarray:
        """Arguments and result as those of `reference.stripe_pool_reduce`, in float32: maps `[n, C, H, W]` and weight
        `[F, C, R]` are rounded to `dtype` and laid out here. An `order` other than 0 seeds the turns that warps take.

        Raises:
            ValueError: the problem is not one that the kernels take.
            RuntimeError: the C API returned an error.
        """
        batch, channels = maps[0].shape[:2]
        reduced, features = weight.shape[2], sum(map(features_of, branches))
        sizes = [(map_.shape[2], map_.shape[3]) for map_ in maps]
        choices = {"pooling": pooling, "neck": neck, "output": output, "path": path}
        problem = make_problem(dtype, layout, batch, channels, reduced, branches, sizes, **choices)  # type: ignore[arg-type]
        plan = self.plan(problem)
        rows = batch // 2 if OUTPUTS[problem.output] == "mirror_embeddings" else batch
        stored_as = np.float32 if output != "features" or dtype == "float32" else np.uint16
        result = np.empty((rows, features * reduced), stored_as)
        with ExitStack() as stack:

            def device(data: np.ndarray | None) -> int | None:
                return None if data is None else self._copy(stack, data)

            def float32(data: np.ndarray | None) -> np.ndarray | None:
                return None if data is None else np.ascontiguousarray(data, np.float32)

            in_layout = [map_.transpose(0, 2, 3, 1) if layout == "nhwc" else map_ for map_ in maps]
            addresses = [device(_bits(map_, dtype)) for map_ in in_layout] + [None] * (MAX_BRANCHES - len(maps))
            # All bits set is NaN in every type: what is read before it was written shows.
            workspace = np.full(plan.workspace_bytes, 0xFF, np.uint8)
            workspace[:BARRIER_BYTES] = 0
            unwritten = np.full(result.nbytes, 0xFF, np.uint8)
            pointers = Pointers(
                (ctypes.c_void_p * MAX_BRANCHES)(*addresses),
                device(_bits(weight.transpose(0, 2, 1), dtype)),
                *(device(float32(data)) for data in (bias, scale, shift, powers)),
                device(workspace),
                device(unwritten),
            )
            self.library.shim_order(order)
            arguments = (ctypes.byref(problem), ctypes.byref(plan), ctypes.byref(pointers), None)
            self._check(self.library.mgn_spr_launch(*arguments))
            ctypes.memmove(result.ctypes.data, pointers.output, result.nbytes)
        kind = "float32" if stored_as is np.float32 else DTYPES[problem.dtype]
        return _numbers(result.view(np.float16) if kind == "float16" else result, kind)

    def _copy(self, stack: ExitStack, data: np.ndarray) -> int:
        """Into memory of exactly that size from the library's own allocator, which a sanitizer watches."""
        address = self.library.shim_allocate(data.nbytes)
        stack.callback(self.library.shim_free, address)
        ctypes.memmove(address, np.ascontiguousarray(data).ctypes.data, data.nbytes)
        return address

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.library.mgn_spr_error(status).decode())
