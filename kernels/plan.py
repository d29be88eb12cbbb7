"""Which kernels of `stripe_pool_reduce.cu` compute a problem, and over which grids.

The only planner: `kernels/nvrtc.py` and `kernels/pycuda_.py` launch by it on a GPU, `tests/emulator` on a CPU. It needs
neither a GPU nor a CUDA package.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise, product

from mgn_deploy.config import features_of, region_rows

# By each name, what the kernels' source calls it. What becomes a number in Params is numbered in the source's order.
TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat"}
LAYOUTS = {"nchw": "kNchw", "nhwc": "kNhwc"}
POOLINGS = {"max": "kMax", "avg": "kAvg", "gem": "kGem"}
NECKS = {"relu": "kRelu", "linear": "kLinear", "relu_norm": "kReluNorm"}
OUTPUTS = {"features": "kFeatures", "embeddings": "kEmbeddings", "mirror_embeddings": "kMirrorEmbeddings"}
PATHS = ("auto", "fused", "rows", "tiles")
CHOICES = {"dtype": TYPES, "layout": LAYOUTS, "pooling": POOLINGS, "neck": NECKS, "output": OUTPUTS, "path": PATHS}

MAX_BRANCHES, MAX_STRIPES, MAX_BATCH = 4, 8, 1024
MAX_REGIONS, MAX_RUNS = 1 + MAX_STRIPES, 2 * MAX_STRIPES - 1
MAX_PIXELS = 1 << 24  # of a map
MAX_ROWS = 8  # images that the paths "fused" and "rows" take
OVERLAP_DRIVER = 12030  # the first whose graphs capture programmatic launches, by the release notes of CUDA 12.3
BARRIER_BYTES = 256  # at a workspace's beginning

THREADS, WARPS = 256, 8
TILE = 64  # images and outputs of a block of the path "tiles"
MMA_THREADS, MMA_DEPTH, MMA_STRIDE = 128, 64, 72
FMA_DEPTH, FMA_STRIDE = 16, 68
TILE_CHANNELS = {"nchw": 32, "nhwc": 64}  # of the pool
# Bytes of dynamic shared memory: two tiles of 16-bit numbers, two of float32; for each run and warp of the NHWC pool a
# 32-bit word a channel (16-bit maxima fill half); a float32 for each warp of the epilogue.
MMA_SHARED, FMA_SHARED = 2 * TILE * MMA_STRIDE * 2, 2 * FMA_DEPTH * FMA_STRIDE * 4
RUN_SHARED, EPILOGUE_SHARED = WARPS * TILE_CHANNELS["nhwc"] * 4, WARPS * 4


@dataclass(frozen=True)
class Problem:
    """The heads of a batch of maps, `[batch, channels, H, W]` or `[batch, H, W, channels]`.

    Args:
        dtype: of maps and weight: "float32", "float16" or "bfloat16".
        layout: of the maps: "nchw" or "nhwc".
        batch: rows of the maps, 1 to 1024, mirrors counted.
        channels: a multiple of 8.
        reduced: R, the width of a feature after its reduction, a multiple of 16.
        branches: each map's number of stripes, 1 to 8, of up to four maps.
        sizes: each map's height and width, at most 2^24 pixels.
        pooling: "max", "avg" or "gem".
        neck: "relu", "linear" or "relu_norm".
        output: "features" `[batch, F * R]` of the maps' type, rounded once after float32 sums; "embeddings", float32
            unit rows of the same shape; or "mirror_embeddings" `[batch / 2, F * R]`, float32 unit rows of the average
            with the mirror: image n's mirror is row n + batch / 2.
        path: "fused", one cooperative launch, and "rows", the same arithmetic in three launches, both for a batch of up
            to 8; "tiles", three launches with matrix tiles, on tensor cores where the maxima are of 16 bits; or "auto".

    Raises:
        ValueError: it is not one that the kernels take.
    """

    dtype: str
    layout: str
    batch: int
    channels: int
    reduced: int
    branches: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    _: KW_ONLY
    pooling: str = "max"
    neck: str = "relu"
    output: str = "features"
    path: str = "auto"

    def __post_init__(self) -> None:
        wrong = self._wrong()
        if wrong:
            raise ValueError(f"stripe_pool_reduce: {wrong}")

    def _wrong(self) -> str | None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                return f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
        if not 1 <= self.batch <= MAX_BATCH:
            return f"a batch of {self.batch} is not 1 to {MAX_BATCH}"
        if self.output == "mirror_embeddings" and self.batch % 2:
            return f"a batch of {self.batch} is not images and as many mirrors"
        if self.path in ("fused", "rows") and self.batch > MAX_ROWS:
            return f"the path {self.path} is for batches up to {MAX_ROWS}, not {self.batch}"
        if self.channels < 8 or self.channels % 8:
            return f"{self.channels} channels are not a multiple of 8"
        if self.reduced < 16 or self.reduced % 16:
            return f"a reduced width of {self.reduced} is not a multiple of 16"
        if not 1 <= len(self.branches) <= MAX_BRANCHES or not all(1 <= n <= MAX_STRIPES for n in self.branches):
            return f"branches {self.branches} are not 1 to {MAX_BRANCHES}, each of 1 to {MAX_STRIPES} stripes"
        maps_fit = all(height >= 1 and width >= 1 and height * width <= MAX_PIXELS for height, width in self.sizes)
        if len(self.sizes) != len(self.branches) or not maps_fit:
            return f"maps of {list(self.sizes)} are not one a branch of 1 to 2^24 pixels"
        return None

    @property
    def features(self) -> int:
        """F, the number of pooled vectors of an image."""
        return sum(map(features_of, self.branches))

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return self.batch // 2 if self.output == "mirror_embeddings" else self.batch

    @property
    def pooled_type(self) -> str:
        """What the kernels store pooled vectors as: a maximum is one of the map's numbers, a mean is not."""
        return TYPES[self.dtype] if self.pooling == "max" else "float"

    @property
    def channel_tiles(self) -> int:
        return -(-self.channels // TILE_CHANNELS[self.layout])

    @property
    def pool_items(self) -> int:
        """Blocks of the pool: one a tile of channels, branch and row of the maps."""
        return self.channel_tiles * len(self.branches) * self.batch

    def row_runs(self, branch: int) -> list[tuple[int, int]]:
        """The runs of a branch's map, first and past-the-last row: see the picture in stripe_pool_reduce.cu."""
        regions = region_rows(self.sizes[branch][0], self.branches[branch])
        if self.pooling == "gem":  # each region has a power of its own, so no two can share a run
            return regions
        return list(pairwise(sorted({border for region in regions for border in region})))


@dataclass(frozen=True)
class Device:
    """What a plan depends on: multiprocessors, compute capability (90 for 9.0), how many blocks of the problem's fused
    kernel fit on one multiprocessor (0 where the device has no cooperative launch), the CUDA version of the driver
    (12030 for 12.3; 0 where launches can have no attributes)."""

    multiprocessors: int
    capability: int
    resident_blocks: int
    driver: int = 0


@dataclass(frozen=True)
class Plan:
    """How a problem is computed on a device.

    `path` is never "auto". In "tiles" the sum over channels has `splits` parts of `depth` channels, each by its own
    block, on `tensor_cores` or not. `fused_blocks` is the grid of "fused". Where `overlapped`, the second and third of
    three launches start while the one before ends, and `row_blocks` blocks, a cluster, share a row of the epilogue;
    else the launches are plain. `partial_offset` is in bytes from the start of the workspace, where the barrier is and
    then, at `BARRIER_BYTES`, the pooled vectors.
    """

    path: str
    tensor_cores: bool
    splits: int
    depth: int
    fused_blocks: int
    overlapped: bool
    row_blocks: int
    partial_offset: int
    workspace_bytes: int


def plan_on(problem: Problem, device: Device) -> Plan:
    """Plan a problem for a device.

    "auto" takes "fused" (or, without cooperative launch, "rows") up to 8 images and "tiles" above. No measurement has
    set that border.
    """
    channels, narrow = problem.channels, problem.pooled_type != "float"
    path = problem.path
    if path == "auto":
        path = "tiles" if problem.batch > MAX_ROWS else "fused" if device.resident_blocks else "rows"
    splits, depth, fused_blocks = 1, channels, 0
    dim = problem.features * problem.reduced
    if path == "tiles":  # two blocks a multiprocessor, but at least four steps of 64 channels a block
        tiles = problem.features * -(-problem.reduced // TILE) * -(-problem.batch // TILE)
        wanted = min(2 * device.multiprocessors // tiles, channels // (4 * MMA_DEPTH))
        if wanted > 1:
            depth = _round_up(-(-channels // wanted), MMA_DEPTH)
            splits = -(-channels // depth)
    if path == "fused":  # no more blocks than have something to do
        useful = max(problem.pool_items, dim // WARPS)
        fused_blocks = min(useful, device.multiprocessors * device.resident_blocks)
    pooled_bytes = (2 if narrow else 4) * problem.features * problem.batch * channels
    partial_offset = BARRIER_BYTES + _round_up(pooled_bytes, 256)
    overlapped = path != "fused" and device.capability >= 90 and device.driver >= OVERLAP_DRIVER
    row_blocks = next((n for n in (4, 2) if overlapped and n * problem.rows <= device.multiprocessors), 1)
    return Plan(
        path=path,
        tensor_cores=path == "tiles" and narrow and device.capability >= (80 if problem.dtype == "bfloat16" else 75),
        splits=splits,
        depth=depth,
        fused_blocks=fused_blocks,
        overlapped=overlapped,
        row_blocks=row_blocks,
        partial_offset=partial_offset,
        workspace_bytes=partial_offset + _round_up(4 * splits * problem.batch * dim, 256),
    )


def may_be_fused(problem: Problem) -> bool:
    """Whether its plan on some device takes the path "fused": only then is that kernel worth compiling."""
    return problem.path in ("auto", "fused") and problem.batch <= MAX_ROWS


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Launch:
    """One kernel: its name in C++ without namespace, blocks, threads a block, bytes of dynamic shared memory; whether
    all blocks are on the device together, whether they may start before the launch before has ended, and how many are a
    cluster."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool = False
    programmatic: bool = False
    cluster: int = 1


def launches(problem: Problem, plan: Plan) -> list[Launch]:
    """List the kernels of a plan, in order, on one stream."""
    kind, pooled = TYPES[problem.dtype], problem.pooled_type
    if plan.path == "fused":
        return [fused_launch(problem, plan.fused_blocks)]
    if plan.path == "rows":
        outputs = problem.features * problem.reduced
        reduce = Launch(f"rows_kernel<{kind}, {pooled}>", (outputs // WARPS, 1, 1), THREADS, 0)
    else:
        tiles = (-(-problem.reduced // TILE), -(-problem.batch // TILE), problem.features * plan.splits)
        if plan.tensor_cores:
            reduce = Launch(f"mma_kernel<{kind}>", tiles, MMA_THREADS, MMA_SHARED)
        else:
            reduce = Launch(f"fma_kernel<{kind}, {pooled}>", tiles, THREADS, FMA_SHARED)
    pool = Launch(_pooling_kernel("pool", problem), (problem.pool_items, 1, 1), THREADS, _pool_shared(problem))
    blocks = (problem.rows * plan.row_blocks, 1, 1)
    threads = THREADS // plan.row_blocks
    finish = Launch(f"epilogue_kernel<{kind}>", blocks, threads, EPILOGUE_SHARED, cluster=plan.row_blocks)
    return [pool, *(replace(one, programmatic=plan.overlapped) for one in (reduce, finish))]


def fused_launch(problem: Problem, blocks: int = 1) -> Launch:
    """Return the fused kernel of a problem; `Device.resident_blocks` is asked of a GPU for one block of it."""
    return Launch(_pooling_kernel("fused", problem), (blocks, 1, 1), THREADS, _pool_shared(problem), cooperative=True)


def all_kernels() -> list[str]:
    """Name all kernels that a plan can have."""
    found = set()
    for dtype, layout, pooling, path in product(TYPES, LAYOUTS, POOLINGS, PATHS[1:]):
        problem = Problem(dtype, layout, 1, 8, 16, (1,), ((1, 1),), pooling=pooling, path=path)
        for capability in (70, 80):  # without and with tensor cores
            found |= {one.kernel for one in launches(problem, plan_on(problem, Device(1, capability, 1)))}
    return sorted(found)


def _pooling_kernel(name: str, problem: Problem) -> str:
    return f"{name}_kernel<{TYPES[problem.dtype]}, {LAYOUTS[problem.layout]}, {POOLINGS[problem.pooling]}>"


def _pool_shared(problem: Problem) -> int:
    if problem.layout == "nchw":
        return EPILOGUE_SHARED  # the pool needs none; the fused kernel's epilogue does
    return RUN_SHARED * max(len(problem.row_runs(branch)) for branch in range(len(problem.branches)))
