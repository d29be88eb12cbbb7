"""`stripe_pool_reduce.cu` for pipelines that hold PyCUDA's `GPUArray`s.

    problem = Problem("float16", "nhwc", 2 * n, 2048, 256, (1, 2, 3), sizes, output="mirror_embeddings")
    heads = PycudaKernel(problem)                             # with the pipeline's context current
    heads.launch(maps, weight, bias, embeddings, stream)      # as often as wanted; allocates nothing

The kernels are loaded by PyCUDA into its current context: `nvrtc.PlannedKernel` would make the device's primary context
current, and PyCUDA's own (`pycuda.autoinit`) is another one. PyCUDA has no cooperative launch, so the path "fused" is
refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.kernels.nvrtc import compile_kernels
from mgn_deploy.kernels.params import Params, Pointers, params_of
from mgn_deploy.kernels.plan import Device, Problem, launches, plan_on

TYPESTRS = {"float32": ("<f4",), "float16": ("<f2",), "bfloat16": ("<u2", "<V2")}  # NumPy has no bfloat16: its bits


class PycudaKernel:
    """One problem, planned, compiled and loaded for the PyCUDA context that is current. It holds the workspace, so its
    launches belong on one stream at a time.

    Raises:
        CannotRun: PyCUDA or NVRTC is not installed.
        UserError: no context is current, the driver does not take the machine code, or the path fused is asked for.
    """

    def __init__(self, problem: Problem) -> None:
        if problem.path == "fused":
            raise UserError("PyCUDA has no cooperative launch, which the path fused needs: use the path auto")
        try:
            from pycuda import driver
        except ImportError as error:
            raise CannotRun(f"PyCUDA cannot be imported ({error}): pip install pycuda, which compiles it") from None
        try:
            device = driver.Context.get_device()
            major, minor = device.compute_capability()
            multiprocessors = device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
        except driver.Error as error:
            raise UserError(f"no PyCUDA context is current in this thread ({error}): push() the pipeline's") from None
        self.problem = problem
        self.plan = plan_on(problem, Device(multiprocessors, 10 * major + minor, resident_blocks=0))
        self._launches = launches(problem, self.plan)
        code = compile_kernels(tuple(one.kernel for one in self._launches), f"sm_{major}{minor}")
        try:
            self._module = driver.module_from_buffer(code.cubin)
        except driver.Error as error:
            raise UserError(
                f"the GPU's driver does not load the kernels ({error}): it may be older than the installed NVRTC"
            ) from None
        functions = [self._module.get_function(code.symbols[one.kernel]) for one in self._launches]
        self._functions = [function.prepare([f"{ctypes.sizeof(Params)}s"]) for function in functions]
        self._workspace = driver.mem_alloc(self.plan.workspace_bytes)

    def launch(
        self,
        maps: Sequence[Any],
        weight: Any,
        bias: Any,
        output: Any,
        stream: Any = None,
        *,
        scale: Any = None,
        shift: Any = None,
        powers: Any = None,
    ) -> None:
        """Start it on a `pycuda.driver.Stream`; the context must be current.

        Args:
            maps: one `GPUArray` a branch, `[n, C, H, W]` or, for "nhwc", `[n, H, W, C]`; of bfloat16 its bits.
            weight: `[F, R, C]` of the maps' type; `bias`, `scale`, `shift` `[F, R]` and `powers` `[F]` are float32.
            output: written, as `Problem.output` says.

        Raises:
            ValueError: an array has another shape, type or order, or begins off 16 bytes.
        """
        workspace = int(self._workspace)
        pointers = pointers_to(self.problem, workspace, maps, weight, bias, output, scale, shift, powers)
        params = bytes(params_of(self.problem, self.plan, pointers))
        for one, function in zip(self._launches, self._functions, strict=True):
            function.prepared_async_call(one.grid, (one.threads, 1, 1), stream, params, shared_size=one.shared)


def pointers_to(
    problem: Problem,
    workspace: int,
    maps: Sequence[Any],
    weight: Any,
    bias: Any,
    output: Any,
    scale: Any = None,
    shift: Any = None,
    powers: Any = None,
) -> Pointers:
    """Find the addresses of arrays that have `__cuda_array_interface__`, as `GPUArray`s do, beside the workspace's.

    Arguments and errors are those of `PycudaKernel.launch`.
    """
    if len(maps) != len(problem.branches):
        raise ValueError(f"stripe_pool_reduce: {len(maps)} maps are not the {len(problem.branches)} of the problem")
    batch, channels = problem.batch, problem.channels
    map_addresses = []
    for index, (map_, pixels) in enumerate(zip(maps, problem.sizes, strict=True)):
        shape = (batch, *pixels, channels) if problem.layout == "nhwc" else (batch, channels, *pixels)
        map_addresses.append(_address(f"map {index}", map_, shape, problem.dtype))
    by_feature = (problem.features, problem.reduced)
    normed, gem = problem.neck == "relu_norm", problem.pooling == "gem"
    return Pointers(
        tuple(map_addresses),
        weight=_address("weight", weight, (*by_feature, channels), problem.dtype),
        bias=_address("bias", bias, by_feature),
        scale=_address("scale", scale, by_feature) if normed else None,
        shift=_address("shift", shift, by_feature) if normed else None,
        power=_address("powers", powers, (problem.features,)) if gem else None,
        workspace=workspace,
        output=_address(
            "output",
            output,
            (problem.rows, problem.features * problem.reduced),
            problem.dtype if problem.output == "features" else "float32",
        ),
    )


def _address(name: str, array: Any, shape: tuple[int, ...], dtype: str = "float32") -> int:
    """Where a dense array of that shape and type begins."""
    facts = getattr(array, "__cuda_array_interface__", None)
    if facts is None:
        raise ValueError(f"stripe_pool_reduce: {name} is {type(array).__name__} and no array on the GPU")
    if tuple(facts["shape"]) != shape or facts["typestr"] not in TYPESTRS[dtype]:
        found = f"{facts['typestr']} {list(facts['shape'])}"
        raise ValueError(f"stripe_pool_reduce: {name} is {found}, needs {dtype} ({TYPESTRS[dtype][0]}) {list(shape)}")
    step = int(facts["typestr"][2:])
    strides = facts.get("strides") or ()
    for size, stride in zip(reversed(shape), reversed(strides), strict=False):
        if size > 1 and stride != step:
            raise ValueError(f"stripe_pool_reduce: {name} is not dense in C order: its strides are {list(strides)}")
        step *= size
    address = int(facts["data"][0])
    if address % 16:
        raise ValueError(f"stripe_pool_reduce: {name} begins at {address:#x}, not at a multiple of 16 bytes")
    return address
