"""Which kernels of `stripe_pool_reduce.cu` compute a problem, over which grids, told what: the C API's plans in Python.

For kernels that NVRTC compiled (`kernels/nvrtc.py`), where there is no host code to call. `tests/test_kernel_host.py`
holds every number here against the C code's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mgn_deploy.config import Neck, Pooling, stripe_rows

# Their places are the values of the enums in stripe_pool_reduce.h.
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "nhwc")
POOLINGS: tuple[Pooling, ...] = ("max", "avg", "gem")
NECKS: tuple[Neck, ...] = ("relu", "linear", "relu_norm")
OUTPUTS = ("features", "embeddings", "mirror_embeddings")
PATHS = ("auto", "fused", "rows", "tiles")
AUTO, FUSED, ROWS, TILES = range(4)

MAX_BRANCHES, MAX_REGIONS, MAX_RUNS, MAX_BATCH, MAX_ROWS = 4, 9, 15, 1024, 8
BARRIER_BYTES = 256
THREADS, WARPS, TILE, MMA_THREADS, MMA_DEPTH = 256, 8, 64, 128, 64
TILE_CHANNELS = (32, 64)  # of the pool, by layout
MMA_SHARED, FMA_SHARED, RUN_SHARED = 18432, 8704, 2048  # bytes
TYPES = ("float", "Half", "Bfloat")


class Problem(ctypes.Structure):
    """`mgn_spr_problem`."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "layout", "pooling", "neck", "output", "path")),
        *((name, ctypes.c_int) for name in ("batch", "channels", "reduced", "branches")),
        *((name, ctypes.c_int * MAX_BRANCHES) for name in ("stripes", "heights", "widths")),
    )


class Plan(ctypes.Structure):
    """`mgn_spr_plan`."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("path", "tensor_cores", "splits", "depth", "fused_blocks", "reserved")),
        *((name, ctypes.c_longlong) for name in ("pooled_offset", "partial_offset", "workspace_bytes")),
    )


class Pointers(ctypes.Structure):
    """`mgn_spr_pointers`."""

    _fields_ = (
        ("maps", ctypes.c_void_p * MAX_BRANCHES),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift", "power", "workspace", "output")),
    )


class Branch(ctypes.Structure):
    """`Branch` of the kernels."""

    _fields_ = (
        ("map", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("pixels", "first_feature", "regions", "runs")),
        *((name, ctypes.c_int * MAX_RUNS) for name in ("run_begin", "run_end")),
        *((name, ctypes.c_int * MAX_REGIONS) for name in ("region_begin", "region_end", "region_pixels")),
    )


class Params(ctypes.Structure):
    """`Params` of the kernels, their only argument."""

    _fields_ = (
        ("branch", Branch * MAX_BRANCHES),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift", "power")),
        *((name, ctypes.c_void_p) for name in ("barrier", "pooled", "partial", "output")),
        *((name, ctypes.c_int) for name in ("branches", "batch", "channels", "reduced", "features")),
        *((name, ctypes.c_int) for name in ("neck", "output_kind", "channel_tiles", "pool_items", "splits", "depth")),
    )


@dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors, compute capability (90 for 9.0), how many blocks of the problem's fused
    kernel fit on one multiprocessor (0 where the device has no cooperative launch)."""

    multiprocessors: int
    capability: int
    resident_blocks: int


@dataclass(frozen=True)
class Launch:
    """One kernel: its name in C++ without namespace, blocks, threads a block, bytes of dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool = False


def features_of(stripes: int) -> int:
    return 1 if stripes == 1 else 1 + stripes


def make_problem(
    dtype: str,
    layout: str,
    batch: int,
    channels: int,
    reduced: int,
    branches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    *,
    pooling: Pooling = "max",
    neck: Neck = "relu",
    output: str = "features",
    path: str = "auto",
) -> Problem:
    """The problem by its names; `sizes` are each map's height and width.

    Raises:
        ValueError: it is not one that the kernels take.
    """
    wrong = _wrong(layout, batch, channels, reduced, branches, sizes, output, path)
    if wrong:
        raise ValueError(f"stripe_pool_reduce: {wrong}")
    empty = [0] * (MAX_BRANCHES - len(branches))
    return Problem(
        DTYPES.index(dtype),
        LAYOUTS.index(layout),
        POOLINGS.index(pooling),
        NECKS.index(neck),
        OUTPUTS.index(output),
        PATHS.index(path),
        batch,
        channels,
        reduced,
        len(branches),
        (ctypes.c_int * MAX_BRANCHES)(*branches, *empty),
        (ctypes.c_int * MAX_BRANCHES)(*(height for height, _ in sizes), *empty),
        (ctypes.c_int * MAX_BRANCHES)(*(width for _, width in sizes), *empty),
    )


def _wrong(
    layout: str,
    batch: int,
    channels: int,
    reduced: int,
    branches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    output: str,
    path: str,
) -> str | None:
    if not 1 <= batch <= MAX_BATCH:
        return f"a batch of {batch} is not 1 to {MAX_BATCH}"
    if output == "mirror_embeddings" and batch % 2:
        return f"a batch of {batch} is not images and as many mirrors"
    if path in ("fused", "rows") and batch > MAX_ROWS:
        return f"the path {path} is for batches up to {MAX_ROWS}, not {batch}"
    if channels < 8 or channels % 8:
        return f"{channels} channels are not a multiple of 8"
    if reduced < 16 or reduced % 16:
        return f"a reduced width of {reduced} is not a multiple of 16"
    if not 1 <= len(branches) <= MAX_BRANCHES or not all(1 <= stripes <= 8 for stripes in branches):
        return f"branches {tuple(branches)} are not 1 to {MAX_BRANCHES}, each of 1 to 8 stripes"
    if len(sizes) != len(branches) or not all(h >= 1 and w >= 1 and h * w <= 1 << 24 for h, w in sizes):
        return f"maps of {list(sizes)} are not one a branch of 1 to 2^24 pixels"
    return None


def plan_on(problem: Problem, device: Device) -> Plan:
    """The plan of `mgn_spr_plan_for` on such a device."""
    batch, channels, reduced = problem.batch, problem.channels, problem.reduced
    features = sum(features_of(problem.stripes[b]) for b in range(problem.branches))
    dim, exact, narrow = features * reduced, POOLINGS[problem.pooling] == "max", problem.dtype > 0
    path = problem.path
    if path == AUTO:
        path = TILES if batch > MAX_ROWS else FUSED if device.resident_blocks else ROWS
    least = 80 if DTYPES[problem.dtype] == "bfloat16" else 75
    plan = Plan(path, path == TILES and exact and narrow and device.capability >= least, 1, channels)
    if path == TILES:
        tiles = features * -(-reduced // TILE) * -(-batch // TILE)
        splits = min(2 * device.multiprocessors // tiles, channels // (4 * MMA_DEPTH))
        if splits > 1:
            part = -(-channels // splits)
            plan.depth = -(-part // MMA_DEPTH) * MMA_DEPTH
            plan.splits = -(-channels // plan.depth)
    if path == FUSED:
        items = -(-channels // TILE_CHANNELS[problem.layout]) * problem.branches * batch
        plan.fused_blocks = min(max(items, dim // WARPS), device.multiprocessors * device.resident_blocks)
    plan.pooled_offset = BARRIER_BYTES
    plan.partial_offset = BARRIER_BYTES + _aligned((2 if exact and narrow else 4) * features * batch * channels)
    plan.workspace_bytes = plan.partial_offset + _aligned(4 * plan.splits * batch * dim)
    return plan


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def cut(branch: Branch, stripes: int, height: int, width: int, run_a_region: bool) -> None:
    """The runs and regions of a map: see the picture in stripe_pool_reduce.cu."""
    rows = [(0, height), *(stripe_rows(height, stripes) if stripes > 1 else [])]
    if run_a_region:
        runs = rows
    else:
        borders = sorted({border for region in rows for border in region})
        runs = list(pairwise(borders))
    branch.pixels, branch.regions, branch.runs = height * width, len(rows), len(runs)
    for index, (first, last) in enumerate(runs):
        branch.run_begin[index], branch.run_end[index] = first * width, last * width
    for index, (first, last) in enumerate(rows):
        own = [index] if run_a_region else [i for i, run in enumerate(runs) if first <= run[0] and run[1] <= last]
        branch.region_begin[index], branch.region_end[index] = own[0], own[-1] + 1
        branch.region_pixels[index] = (last - first) * width


def params_of(problem: Problem, plan: Plan, pointers: Pointers) -> Params:
    """What the kernels are told."""
    params = Params(
        **{name: getattr(problem, name) for name in ("branches", "batch", "channels", "reduced", "neck")},
        **{name: getattr(pointers, name) for name in ("weight", "bias", "scale", "shift", "power", "output")},
        output_kind=problem.output,
        splits=plan.splits,
        depth=plan.depth,
    )
    for index in range(problem.branches):
        branch = params.branch[index]
        branch.map = pointers.maps[index]
        branch.first_feature = params.features
        cut(
            branch,
            problem.stripes[index],
            problem.heights[index],
            problem.widths[index],
            POOLINGS[problem.pooling] == "gem",
        )
        params.features += branch.regions
    params.channel_tiles = -(-problem.channels // TILE_CHANNELS[problem.layout])
    params.pool_items = params.channel_tiles * problem.branches * problem.batch
    workspace = pointers.workspace or 0
    params.barrier, params.pooled = workspace, workspace + plan.pooled_offset
    params.partial = workspace + plan.partial_offset
    return params


def fused_launch(problem: Problem) -> Launch:
    """The fused kernel of a problem, its grid left at 1: what a device's `resident_blocks` is asked for."""
    kind = f"{TYPES[problem.dtype]}, {problem.layout}, {problem.pooling}"
    return Launch(f"fused_kernel<{kind}>", (1, 1, 1), THREADS, _pool_shared(problem), cooperative=True)


def launches(problem: Problem, plan: Plan) -> list[Launch]:
    """In order, on one stream."""
    fused, params = fused_launch(problem), params_of(problem, plan, Pointers())
    if plan.path == FUSED:
        return [Launch(fused.kernel, (plan.fused_blocks, 1, 1), THREADS, fused.shared, cooperative=True)]
    kind = TYPES[problem.dtype]
    pooled = kind if POOLINGS[problem.pooling] == "max" else "float"
    dim = params.features * problem.reduced
    tiles = (-(-problem.reduced // TILE), -(-problem.batch // TILE), params.features * plan.splits)
    if plan.path == ROWS:
        reduce = Launch(f"rows_kernel<{kind}, {pooled}>", (dim // WARPS, 1, 1), THREADS, 0)
    elif plan.tensor_cores:
        reduce = Launch(f"mma_kernel<{kind}>", tiles, MMA_THREADS, MMA_SHARED)
    else:
        reduce = Launch(f"fma_kernel<{kind}, {pooled}>", tiles, THREADS, FMA_SHARED)
    rows = problem.batch // 2 if OUTPUTS[problem.output] == "mirror_embeddings" else problem.batch
    return [
        Launch(fused.kernel.replace("fused", "pool"), (params.pool_items, 1, 1), THREADS, fused.shared),
        reduce,
        Launch(f"epilogue_kernel<{kind}>", (rows, 1, 1), THREADS, WARPS * 4),
    ]


def _pool_shared(problem: Problem) -> int:
    params = params_of(problem, Plan(), Pointers())
    runs = max(params.branch[index].runs for index in range(problem.branches))
    return runs * RUN_SHARED if LAYOUTS[problem.layout] == "nhwc" else WARPS * 4
