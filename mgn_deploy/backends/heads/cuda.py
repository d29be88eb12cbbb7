"""The fused heads on a GPU: an engine's maps, in the buffers where it left them, to embeddings by the
stripe-pool-reduce kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import CannotRun, UserError

if TYPE_CHECKING:
    from mgn_deploy.backends.heads.cut import FusedHeads

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class MapType:
    """How an engine writes its maps: `dtype` of all, "nchw" or "nhwc", `sizes` (height, width) one a branch."""

    dtype: str
    layout: str
    channels: int
    sizes: tuple[tuple[int, int], ...]

    def bytes_of(self, branch: int) -> int:
        """Of one image's map."""
        height, width = self.sizes[branch]
        return self.channels * height * width * ITEM_BYTES[self.dtype]


class CudaHeads:
    """Maps and weights on the GPU that is current in this thread. One stream at a time.

    `map_addresses` is where an engine has to write its maps, one a branch, for up to `most` images (and as many
    mirrors).

    Args:
        heads: of the bundle.
        maps: as the engine writes them.
        most: images a call.
        device: a `cuda.core.Device`.
        stream: a `cuda.core.Stream`, for allocating and copying; done when this returns.
    """

    def __init__(self, heads: FusedHeads, maps: MapType, most: int, device: Any, stream: Any) -> None:
        self._heads, self._maps, self._device, self._stream = heads, maps, device, stream
        self._views = 2 if heads.flip else 1
        # One by one, and not in a comprehension: cuda-core loses an error that comes while one is left with buffers in
        # it.
        self._buffers: list[Any] = []
        for branch in range(len(maps.sizes)):
            self._buffers.append(device.allocate(most * self._views * maps.bytes_of(branch), stream=stream))
        # Exact: export rounded them to the maps' type.
        weight = heads.weight.view(np.uint32) >> 16 if maps.dtype == "bfloat16" else heads.weight
        stored = weight.astype({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[maps.dtype])
        self._numbers: list[Any] = []
        for values in (stored, heads.bias, heads.scale, heads.shift, heads.power):
            self._numbers.append(self._upload(values))
        self._planned: dict[int, tuple[Any, Any]] = {}  # by images: kernel, workspace

    @property
    def map_addresses(self) -> list[int]:
        return [int(buffer.handle) for buffer in self._buffers]

    def prepare(self, images: int) -> None:
        """Plan and, where this machine has not done it before, compile for that many images; `launch` then allocates
        nothing."""
        from mgn_deploy.kernels.nvrtc import PlannedKernel
        from mgn_deploy.kernels.plan import Problem

        if images in self._planned:
            return
        config, maps = self._heads.config, self._maps
        problem = Problem(
            maps.dtype,
            maps.layout,
            images * self._views,
            maps.channels,
            config.reduced_width,
            config.branches,
            maps.sizes,
            pooling=config.pooling,
            neck=config.neck,
            output="mirror_embeddings" if self._heads.flip else "embeddings",
        )
        kernel = PlannedKernel(problem, self._device.device_id)
        workspace = self._device.allocate(kernel.workspace_bytes, stream=self._stream)
        workspace.fill(0, stream=self._stream)
        self._stream.sync()
        self._planned[images] = (kernel, workspace)

    def launch(self, images: int, embeddings: int, stream: Any) -> None:
        """From the maps of that many images, for which `prepare` was called, to float32 rows at the address
        `embeddings`."""
        from mgn_deploy.kernels.params import Pointers

        kernel, workspace = self._planned[images]
        weight, bias, *optional = self._numbers
        scale, shift, power = (None if buffer is None else int(buffer.handle) for buffer in optional)
        own = (int(weight.handle), int(bias.handle), scale, shift, power)
        pointers = Pointers(tuple(self.map_addresses), *own, int(workspace.handle), embeddings)
        kernel.launch(pointers, int(stream.handle))

    def _upload(self, values: np.ndarray | None) -> Any:
        if values is None:
            return None
        from cuda.core import LegacyPinnedMemoryResource

        pinned = LegacyPinnedMemoryResource().allocate(values.nbytes)
        ctypes.memmove(int(pinned.handle), np.ascontiguousarray(values).ctypes.data, values.nbytes)
        buffer = self._device.allocate(values.nbytes, stream=self._stream)
        buffer.copy_from(pinned, stream=self._stream)
        self._stream.sync()
        return buffer


def heads_of_graph(graph: bytes, config: ModelConfig) -> FusedHeads:
    """Take the heads' numbers out of an exported graph.

    Raises:
        CannotRun: the kernel cannot be compiled here.
        UserError: the kernel does not take this model's heads.
    """
    import onnx

    from mgn_deploy.backends.heads.cut import cut_heads

    _, heads = cut_heads(onnx.load_from_string(graph), config)
    check_kernel(config, heads.flip, 1)
    return heads


def check_kernel(config: ModelConfig, flip: bool, max_batch: int) -> None:
    """Raise CannotRun where the kernel cannot be compiled here, UserError where it does not take such heads."""
    from mgn_deploy.backends.heads.cut import check_heads
    from mgn_deploy.kernels.nvrtc import nvrtc_problem

    problem = nvrtc_problem()
    if problem:
        raise CannotRun(f"fused heads: {problem}")
    check_heads(config, flip, max_batch)


def map_type(dtypes: Sequence[str], layouts: Sequence[str], shapes: Sequence[Sequence[int]]) -> MapType:
    """Of an engine's outputs, `shapes` being `[n, C, H, W]` whatever the layout.

    Raises:
        UserError: they differ where the kernel takes them alike.
    """
    alike = len(set(dtypes)) == len(set(layouts)) == 1
    if not alike or dtypes[0] not in ITEM_BYTES or layouts[0] not in ("nchw", "nhwc"):
        raise UserError(
            f"the engine writes its maps as {', '.join(dtypes)} in {', '.join(layouts)}, and the kernel of the fused "
            "heads takes them of one type and layout: leave out --fused-heads"
        )
    return MapType(dtypes[0], layouts[0], int(shapes[0][1]), tuple((int(shape[2]), int(shape[3])) for shape in shapes))
