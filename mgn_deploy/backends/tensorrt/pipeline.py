"""Batches through a TensorRT engine: copies beside computing, one CUDA graph a batch size. All CUDA goes by
`cuda-core`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.backends.heads.cuda import CudaHeads, MapType, map_type
from mgn_deploy.backends.pipeline import SLOTS, Pipeline
from mgn_deploy.backends.tensorrt.package import import_tensorrt, logger, title
from mgn_deploy.bundle.manifest import TensorRtName
from mgn_deploy.cuda.buffers import array_of, part
from mgn_deploy.cuda.errors import cuda_errors, cuda_sentence
from mgn_deploy.errors import UserError

if TYPE_CHECKING:
    from mgn_deploy.backends.heads.cut import FusedHeads


class CudaPipeline(Pipeline["_Slot"]):
    """One thread's streams, buffers, execution contexts and CUDA graphs.

    A CUDA graph holds on to what its context was set to, so each batch size has a context of its own. They run one
    after the other and share their working memory.

    Args:
        engine: with input uint8 `images` `[n, height, width, 3]` and output float32 `embeddings` `[n, dim]`, or, with
            fused heads, the maps.
        engine_name: of the engine.
        dim: of an embedding.
        heads: what follows an engine that ends with the maps.
    """

    def __init__(self, engine: Any, engine_name: TensorRtName, dim: int, heads: FusedHeads | None = None) -> None:
        from cuda.core import Device

        device = Device(0)
        device.set_current()
        self._engine, self._engine_name, self._dim = engine, engine_name, dim
        self._min_batch, _, self._max_batch = (int(shape[0]) for shape in engine.get_tensor_profile_shape("images", 0))
        self._image = tuple(engine.get_tensor_shape("images"))[1:]
        self._upload, self._compute, self._download = (device.create_stream() for _ in range(3))
        # Not in a comprehension: cuda-core loses an error that comes while one is left with buffers in it.
        slots: list[_Slot] = []
        for _ in range(SLOTS):
            slots.append(_Slot(device, self._compute, self._max_batch, self._image, dim))
        super().__init__(slots)
        self._memory = device.allocate(max(1, engine.device_memory_size_v2), stream=self._compute)
        self._heads = None
        if heads:
            self._heads = CudaHeads(heads, engine_maps(engine, engine_name), self._max_batch, device, self._compute)
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[tuple[int, int], Any] = {}

    def _submit(self, slot: _Slot, rows: int) -> None:
        given, rows = rows, max(rows, self._min_batch)
        slot.images[given:rows] = slot.images[given - 1]  # where the profile takes no fewer
        bytes_in, bytes_out = rows * int(np.prod(self._image)), rows * self._dim * 4
        with cuda_errors():
            part(slot.device_images, bytes_in).copy_from(part(slot.pinned_images, bytes_in), stream=self._upload)
            self._upload.record(slot.uploaded)
            self._compute.wait(slot.uploaded)
            self._launch(slot, rows)
            self._compute.record(slot.computed)
            self._download.wait(slot.computed)
            embeddings = part(slot.device_embeddings, bytes_out)
            embeddings.copy_to(part(slot.pinned_embeddings, bytes_out), stream=self._download)
            self._download.record(slot.downloaded)

    def _wait(self, slot: _Slot) -> None:
        with cuda_errors():
            slot.downloaded.sync()

    def _drain(self) -> None:
        with cuda_errors():
            for stream in (self._upload, self._compute, self._download):
                stream.sync()

    def _launch(self, slot: _Slot, rows: int) -> None:
        key = (self._slots.index(slot), rows)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self._compute)
            return
        context = self._contexts.get(rows) or self._new_context(rows)
        context.set_tensor_address("images", int(slot.device_images.handle))
        if self._heads:
            self._heads.prepare(rows)
            for name, address in zip(map_names(self._engine), self._heads.map_addresses, strict=True):
                context.set_tensor_address(name, address)
        else:
            context.set_tensor_address("embeddings", int(slot.device_embeddings.handle))
        # This run gives the batch's result, and settles what may not happen while a graph is recorded.
        self._enqueue(context, self._compute, slot, rows)
        self._compute.sync()
        builder = self._compute.create_graph_builder()
        capturable = getattr(context, "is_stream_capturable", None)  # only TensorRT-RTX asks
        if capturable is None or capturable(int(builder.stream.handle)):
            builder.begin_building()
            try:
                self._enqueue(context, builder.stream, slot, rows)
                self._graphs[key] = builder.end_building().complete()
            finally:
                del builder  # ends the capture also after an error: the stream could not even be waited for

    def _new_context(self, rows: int) -> Any:
        context = execution_context(self._engine_name, self._engine)
        if context is None:
            raise UserError(
                f"{title(self._engine_name)} cannot set up the engine: "
                f"{logger(self._engine_name).messages.first_error()}; "
                "where the GPU's memory is full, end what else runs on it"
            )
        context.set_device_memory(int(self._memory.handle), self._memory.size)
        context.set_input_shape("images", (rows, *self._image))
        self._contexts[rows] = context
        return context

    def _enqueue(self, context: Any, stream: Any, slot: _Slot, rows: int) -> None:
        messages = logger(self._engine_name).messages
        messages.clear()
        if not context.execute_async_v3(int(stream.handle)):
            reason = messages.first_error()
            raise UserError(cuda_sentence(reason) or f"{title(self._engine_name)} cannot run the engine: {reason}")
        if self._heads:
            self._heads.launch(rows, int(slot.device_embeddings.handle), stream)


def map_names(engine: Any) -> list[str]:
    """Of an engine that ends with the maps: its outputs `map_0`, `map_1`, ... in the order of the branches, which need
    not be the engine's own (https://github.com/pytorch/TensorRT/pull/1646).
    """
    names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    return sorted(name for name in names if name != "images")


def engine_maps(engine: Any, engine_name: TensorRtName) -> MapType:
    """How it writes its maps. Channels are a multiple of 8, so that 8 channels at a time is channels-last without
    gaps."""
    trt = import_tensorrt(engine_name)
    layouts = {trt.TensorFormat.LINEAR: "nchw", trt.TensorFormat.HWC8: "nhwc", trt.TensorFormat.HWC: "nhwc"}
    dtypes = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    names = map_names(engine)
    return map_type(
        [dtypes.get(engine.get_tensor_dtype(name), "another type") for name in names],
        [layouts.get(engine.get_tensor_format(name), "another layout") for name in names],
        [tuple(engine.get_tensor_shape(name)) for name in names],
    )


def execution_context(engine_name: TensorRtName, engine: Any) -> Any:
    """A context without working memory of its own. TensorRT-RTX compiles a shape's kernels before their first run with
    it, not beside: a CUDA graph would hold the stand-ins for good.
    """
    trt = import_tensorrt(engine_name)
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if engine_name == "tensorrt":
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)


class _Slot:
    """Buffers for one batch on its way, on both sides, and the events that order its three steps."""

    def __init__(self, device: Any, stream: Any, most: int, image: tuple[int, ...], dim: int) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        bytes_in, bytes_out = most * int(np.prod(image)), most * dim * 4
        pinned = LegacyPinnedMemoryResource()
        self.pinned_images = pinned.allocate(bytes_in)
        self.pinned_embeddings = pinned.allocate(bytes_out)
        self.device_images = device.allocate(bytes_in, stream=stream)
        self.device_embeddings = device.allocate(bytes_out, stream=stream)
        stream.sync()  # allocation is ordered on that stream, and others use the memory too
        self.images = array_of(self.pinned_images, np.uint8, (most, *image))
        self.embeddings = array_of(self.pinned_embeddings, np.float32, (most, dim))
        self.uploaded, self.computed, self.downloaded = (device.create_event() for _ in range(3))
