"""TensorRT's parser, and the graph as it takes it; its builder, with errors as sentences, and a build that can be
watched and stopped."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from mgn_deploy.backends.tensorrt.package import import_tensorrt, logger, one_line, title
from mgn_deploy.bundle.manifest import TensorRtName
from mgn_deploy.errors import UserError
from mgn_deploy.progress import Progress

# Parts of builds that were stopped. TensorRT-RTX 1.7.1 once crashed after one: what its threads may still use is not
# freed.
_stopped_builds: list[Any] = []


@dataclass(frozen=True)
class PreparedGraph:
    """The bytes for the parser, and the image input's name, height and width."""

    content: bytes
    input_name: str
    height: int
    width: int


def prepare(graph: onnx.ModelProto) -> PreparedGraph:
    """Cast the pixels of a copy before anything else reads them.

    TensorRT takes uint8 only as the input of a cast; every other operator refuses it. The values are the same.

    Raises:
        UserError: the graph has no uint8 input `[n, height, width, 3]`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    images = _image_input(copy.graph)
    height, width = (dim.dim_value for dim in images.type.tensor_type.shape.dim[1:3])
    pixels = f"{images.name}/float"
    for node in copy.graph.node:
        node.input[:] = [pixels if name == images.name else name for name in node.input]
    cast = helper.make_node("Cast", [images.name], [pixels], name=pixels, to=TensorProto.FLOAT)
    copy.graph.node.insert(0, cast)
    return PreparedGraph(copy.SerializeToString(), images.name, height, width)


def _image_input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    for value in graph.input:
        tensor = value.type.tensor_type
        sides = [dim.dim_value for dim in tensor.shape.dim]
        if tensor.elem_type == TensorProto.UINT8 and len(sides) == 4 and sides[1] and sides[2] and sides[3] == 3:
            return value
    raise UserError(
        f"the graph's inputs are {', '.join(value.name for value in graph.input) or 'none'}, and not uint8 images "
        "[n, height, width, 3]: export it with mgn-deploy"
    )


@dataclass(frozen=True)
class Network:
    """A parsed network with what must live as long: the weights are the parser's."""

    builder: Any
    definition: Any
    parser: Any


def parsed_network(engine: TensorRtName, prepared: PreparedGraph) -> Network:
    """The strongly typed network of a graph.

    Raises:
        UserError: the parser refuses it; the sentence names the node, its operator and the reason.
    """
    trt = import_tensorrt(engine)
    builder = trt.Builder(logger(engine))
    # TensorRT 11 knows no other kind, and may drop the flag.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(definition, logger(engine))
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # the plugin of old is in no portable plan
    if not parser.parse(prepared.content):
        raise UserError(f"{title(engine)} refuses the graph: {_parser_error(parser)}")
    _write_maps_channels_last(trt, definition)
    return Network(builder, definition, parser)


def _write_maps_channels_last(trt: Any, definition: Any) -> None:
    """Outputs of four dimensions are maps for the fused heads, whose kernel takes them all in one layout: the
    convolutions' own.

    In TensorRT the channels-last format of 16-bit types is HWC8 (8 channels at a time), that of float32 HWC.
    """
    outputs = [definition.get_output(index) for index in range(definition.num_outputs)]
    for output in (one for one in outputs if len(one.shape) == 4):
        last = trt.TensorFormat.HWC if output.dtype == trt.DataType.FLOAT else trt.TensorFormat.HWC8
        output.allowed_formats = 1 << int(last)


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "its parser gave no reason"
    error = parser.get_error(0)
    reason = one_line(error.desc())
    if reason in ("", "false"):  # as the parser says of operators that it knows and does not do
        reason = error.code().name.replace("_", " ").lower()
    if not error.node_operator():
        return reason
    return f"node {error.node_name()!r} ({error.node_operator()}): {reason}"


def build_network(engine: TensorRtName, network: Network, config: Any, progress: Progress | None) -> bytes:
    """The serialized plan. The build runs in a thread, so that Ctrl-C reaches this one and stops it.

    Raises:
        UserError: TensorRT cannot build it.
    """
    monitor = _monitor(engine, progress)
    config.progress_monitor = monitor
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:
        building = pool.submit(network.builder.build_serialized_network, network.definition, config)
        try:
            plan = building.result()
        except BaseException:
            monitor.stopped.set()
            _stopped_builds.append((network, config, monitor))
            raise  # when the pool has waited for the build to end
    if monitor.raised is not None:
        _stopped_builds.append((network, config, monitor))
        raise monitor.raised
    if plan is None:
        raise UserError(f"{title(engine)} cannot build the graph: {logger(engine).messages.first_error()}")
    return bytes(memoryview(plan))


def _monitor(engine: TensorRtName, progress: Progress | None) -> Any:
    trt = import_tensorrt(engine)

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Reports, and says stop at the next step. Nothing may be raised through TensorRT: it is kept in `raised`."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = threading.Event()
            self.raised: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not self.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self._steps[phase_name])

        def _report(self, phase: str, step: int) -> None:
            if progress is None or self.stopped.is_set():
                return
            try:
                progress(phase, step, self._steps[phase])
            except BaseException as error:
                self.raised = error
                self.stopped.set()

    return Monitor()
