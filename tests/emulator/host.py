"""`stripe_pool_reduce.cu` compiled for the CPU through `host_shim.h`: how its tests run it where there is no GPU.

The kernels are launched as on a GPU: by `kernels/plan.py`, with what `kernels/nvrtc.py` would hand the driver. Slow, as
a simulation is: a check of what the kernels compute, not a way to compute it.
"""

from __future__ import annotations

import atexit
import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np

from mgn_deploy.choices import Neck, Pooling
from mgn_deploy.config import GEM_EPSILON
from mgn_deploy.kernels import plan
from mgn_deploy.kernels.nvrtc import SOURCE, arguments_by_addresses
from mgn_deploy.kernels.params import Branch, Params, Pointers
from mgn_deploy.kernels.plan import (
    BARRIER_BYTES,
    OVERLAP_DRIVER,
    Device,
    Launch,
    Plan,
    Problem,
    all_kernels,
    launches,
    plan_on,
)

# What the kernels' source has as constants and enumerators, by what `kernels/plan.py` has.
CONSTANTS = {
    "kMaxBranches": plan.MAX_BRANCHES,
    "kMaxStripes": plan.MAX_STRIPES,
    "kMaxImages": plan.MAX_ROWS,
    "kThreads": plan.THREADS,
    "kWarps": plan.WARPS,
    "kTile": plan.TILE,
    "kMmaThreads": plan.MMA_THREADS,
    "kMmaDepth": plan.MMA_DEPTH,
    "kMmaStride": plan.MMA_STRIDE,
    "kFmaDepth": plan.FMA_DEPTH,
    "kFmaStride": plan.FMA_STRIDE,
    **{f"kTileChannels[{name}]": plan.TILE_CHANNELS[key] for key, name in plan.LAYOUTS.items()},
    **{name: number for names in (plan.NECKS, plan.OUTPUTS) for number, name in enumerate(names.values())},
    "kGemEpsilon": f"{GEM_EPSILON}f",
}


def build_host(
    folder: Path,
    compiler: str = "g++",
    sanitize: bool = False,
    source: Path = SOURCE,
    memory_model: bool = False,
    kernels: Sequence[str] | None = None,
) -> Path:
    """Compile to a shared library in `folder`; with AddressSanitizer and UBSan, or by GCC with `memory_model.cpp`,
    where asked. `source` is the kernels' or, to see what the simulation notices, a copy with a fault in it; `kernels`
    are the ones to compile (all).

    Raises:
        RuntimeError: the compiler fails, with what it says: also where it warns, or where the source has other
            constants or structures than `kernels/plan.py` and `kernels/params.py`.
    """
    unit = folder / "kernels.cpp"
    unit.write_text(translation_unit(source, kernels or all_kernels()))
    library = folder / ("kernels_sanitized.so" if sanitize else "kernels.so")
    how = ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else ["-O2"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Jumping between stacks is what the fibers do; a fortified longjmp takes it for an attack.
    always = ["-std=c++17", *warnings, "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-I", str(Path(__file__).parent)]
    parts = [str(unit)]
    if memory_model:  # its hooks are called by the kernels and are not to call themselves
        # GCC warns of "uninitialized" wrongly where its hooks stand between; without them it looks, too.
        hooked = [
            "-fsanitize=thread",
            "--param",
            "tsan-distinguish-volatile=1",
            "-Wno-uninitialized",
            "-DMGN_MEMORY_MODEL",
        ]
        model, parts = Path(__file__).with_name("memory_model.cpp"), []
        for file, options in ((unit, hooked), (model, [])):
            parts.append(str(folder / f"{file.stem}.o"))
            _compile([compiler, *always, *how, *options, "-c", str(file), "-o", parts[-1]])
    _compile([compiler, *always, *how, *parts, "-o", str(library)])
    return library


def _compile(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")


@cache
def host_library() -> Path:
    """Build the kernels once a process, for as long as it lives."""
    folder = tempfile.TemporaryDirectory(prefix="mgn-emulator-")
    atexit.register(folder.cleanup)
    return build_host(Path(folder.name))


def translation_unit(source: Path, names: Sequence[str]) -> str:
    """The kernels, what they must agree on with Python, and each kernel under its name for `shim_launch`."""
    facts = [f"{name} == {value}" for name, value in CONSTANTS.items()]
    for structure in (Branch, Params):
        name = structure.__name__
        facts.append(f"sizeof({name}) == {ctypes.sizeof(structure)}")
        facts += [f"offsetof({name}, {field}) == {getattr(structure, field).offset}" for field, _ in structure._fields_]
    agreed = "".join(f"static_assert({fact});\n" for fact in facts)
    kernels = "".join(f'const shim::Kernel kernel_{i}("{name}", {name});\n' for i, name in enumerate(names))
    return f'#define MGN_HOST_SHIM\n#include "{source}"\n{agreed}{kernels}'


def rounded(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as `dtype` has them, to nearest even, as float32."""
    return _numbers(bits(numbers, dtype), dtype)


def bits(numbers: np.ndarray, dtype: str) -> np.ndarray:
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
    """The kernels on a simulated device.

    Args:
        library: of `build_host`.
        multiprocessors, capability, cooperative, driver: of the device, as plans see it.
    """

    def __init__(
        self,
        library: Path,
        multiprocessors: int = 2,
        capability: int = 90,
        cooperative: bool = True,
        driver: int = OVERLAP_DRIVER,
    ) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.shim_allocate.restype = ctypes.c_void_p
        self.library.shim_allocate.argtypes = [ctypes.c_size_t]
        self.library.shim_free.argtypes = [ctypes.c_void_p]
        self.device = Device(multiprocessors, capability, int(cooperative), driver)
        self.launched: list[Launch] = []  # of the last `launch`

    def plan(self, problem: Problem) -> Plan:
        return plan_on(problem, self.device)

    def launch(self, problem: Problem, plan: Plan, pointers: Pointers, order: int = 0) -> None:
        """Run a plan's kernels. An `order` other than 0 seeds the turns that warps take.

        Raises:
            ValueError: an address is missing or off its alignment.
        """
        (params,) = arguments_by_addresses(problem, plan)(pointers)
        self.library.shim_order(order)
        self.launched = launches(problem, plan)
        for one in self.launched:
            grid = (ctypes.c_uint * 3)(*one.grid)
            attributes = (int(one.cooperative), int(one.programmatic), one.cluster)
            how = (grid, one.threads, ctypes.c_size_t(one.shared), *attributes, params)
            if self.library.shim_launch(one.kernel.encode(), *how):
                raise RuntimeError(f"{one.kernel} is not in the library")
        self.library.shim_finish()

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
        `[F, C, R]` are rounded to `dtype` and laid out here.

        Raises:
            ValueError: the problem is not one that the kernels take.
        """
        sizes = tuple(map_.shape[2:] for map_ in maps)
        choices = {"pooling": pooling, "neck": neck, "output": output, "path": path}
        problem = Problem(dtype, layout, *maps[0].shape[:2], weight.shape[2], tuple(branches), sizes, **choices)
        plan = self.plan(problem)
        result_type = "float32" if output != "features" else dtype
        result = bits(np.full((problem.rows, problem.features * problem.reduced), np.nan), result_type)
        with ExitStack() as stack:

            def device(data: np.ndarray) -> int:
                return self._copy(stack, data)

            def vector(data: np.ndarray | None) -> int | None:
                return None if data is None else device(np.asarray(data, np.float32))

            in_layout = [map_.transpose(0, 2, 3, 1) if layout == "nhwc" else map_ for map_ in maps]
            # All bits set is NaN in every type: what is read before it was written shows.
            workspace = np.full(plan.workspace_bytes, 0xFF, np.uint8)
            workspace[:BARRIER_BYTES] = 0
            pointers = Pointers(
                tuple(device(bits(map_, dtype)) for map_ in in_layout),
                device(bits(weight.transpose(0, 2, 1), dtype)),
                *(vector(data) for data in (bias, scale, shift, powers)),
                device(workspace),
                device(result),
            )
            self.launch(problem, plan, pointers, order)
            ctypes.memmove(result.ctypes.data, pointers.output, result.nbytes)
        return _numbers(result, result_type)

    def _copy(self, stack: ExitStack, data: np.ndarray) -> int:
        """Into memory of exactly that size from the library's own allocator, which a sanitizer watches."""
        address = self.library.shim_allocate(data.nbytes)
        stack.callback(self.library.shim_free, address)
        ctypes.memmove(address, np.ascontiguousarray(data).ctypes.data, data.nbytes)
        return address
