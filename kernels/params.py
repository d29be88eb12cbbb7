"""What the kernels of `stripe_pool_reduce.cu` are told: their one argument, in ctypes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from mgn_deploy.config import region_rows
from mgn_deploy.kernels.plan import BARRIER_BYTES, MAX_BRANCHES, MAX_REGIONS, MAX_RUNS, NECKS, OUTPUTS, Plan, Problem


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


class Pointers(NamedTuple):
    """Addresses in the device's memory, of dense arrays; None where a problem does not need one.

    Attributes:
        maps: one a branch.
        weight: `[F, R, C]` of the maps' type: each feature's 1x1 convolution with its norm folded in.
        bias: `[F, R]`, float32.
        scale: and `shift`, both `[F, R]`, float32, for the neck "relu_norm".
        power: `[F]`, float32, for "gem".
        workspace: the plan's `workspace_bytes`, the first `BARRIER_BYTES` of them zero before the first launch; for one
            stream at a time.
        output: as `Problem.output` says.
    """

    maps: tuple[int, ...]
    weight: int
    bias: int
    scale: int | None
    shift: int | None
    power: int | None
    workspace: int
    output: int


def params_of(problem: Problem, plan: Plan, pointers: Pointers) -> Params:
    """Make what the kernels are told.

    Raises:
        ValueError: a needed address is missing, or one that is loaded from 16 bytes at a time is not a multiple of 16.
    """
    _check(problem, pointers)
    params = Params(
        **{name: getattr(problem, name) for name in ("batch", "channels", "reduced", "features")},
        **{name: getattr(pointers, name) for name in ("weight", "bias", "scale", "shift", "power", "output")},
        barrier=pointers.workspace,
        pooled=pointers.workspace + BARRIER_BYTES,
        partial=pointers.workspace + plan.partial_offset,
        branches=len(problem.branches),
        neck=list(NECKS).index(problem.neck),
        output_kind=list(OUTPUTS).index(problem.output),
        channel_tiles=problem.channel_tiles,
        pool_items=problem.pool_items,
        splits=plan.splits,
        depth=plan.depth,
    )
    first = 0
    for index, address in enumerate(pointers.maps):
        branch = _branch(problem, index)
        branch.map, branch.first_feature = address, first
        params.branch[index] = branch
        first += branch.regions
    return params


def _check(problem: Problem, pointers: Pointers) -> None:
    if len(pointers.maps) != len(problem.branches):
        raise ValueError(
            f"stripe_pool_reduce: {len(pointers.maps)} maps are not the {len(problem.branches)} of the problem"
        )
    wide = {f"map {index}": address for index, address in enumerate(pointers.maps)}
    wide |= {"weight": pointers.weight, "workspace": pointers.workspace}
    needed: dict[str, int | None] = {**wide, "bias": pointers.bias, "output": pointers.output}
    if problem.neck == "relu_norm":
        needed |= {"scale": pointers.scale, "shift": pointers.shift}
    if problem.pooling == "gem":
        needed["power"] = pointers.power
    for name, address in needed.items():
        if not address:
            raise ValueError(f"stripe_pool_reduce: the address of {name} is missing")
        if name in wide and address % 16:
            raise ValueError(f"stripe_pool_reduce: {name} begins at {address:#x}, not at a multiple of 16 bytes")


def _branch(problem: Problem, index: int) -> Branch:
    (height, width), runs = problem.sizes[index], problem.row_runs(index)
    regions = region_rows(height, problem.branches[index])
    branch = Branch(pixels=height * width, regions=len(regions), runs=len(runs))
    for number, (first, last) in enumerate(runs):
        branch.run_begin[number], branch.run_end[number] = first * width, last * width
    for number, (first, last) in enumerate(regions):
        own = [number]  # of a generalised mean; other regions may have several runs, and share them
        if problem.pooling != "gem":
            own = [run for run, (begin, end) in enumerate(runs) if first <= begin and end <= last]
        branch.region_begin[number], branch.region_end[number] = own[0], own[-1] + 1
        branch.region_pixels[number] = (last - first) * width
    return branch
