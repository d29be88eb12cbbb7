"""The table of engines.

Everything that lists engines follows from `ENGINES`: the order of `auto`, `--backend` and `--engine`, `doctor`, INT8
placements, which options go with which engine, and the README's table. To add one, write its backend (`base.py`) and
its row.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from mgn_deploy.choices import Precision
from mgn_deploy.errors import UserError
from mgn_deploy.packages import import_problem

if TYPE_CHECKING:  # the command line's help reads this table: nothing heavy is imported for it
    from mgn_deploy.backends.base import Backend


@dataclass(frozen=True)
class Placement:
    """Where an engine's INT8 graph has its Q/DQ pairs, and of which integers (`export/precision/quantise.py`)."""

    unsigned: bool  # uint8 activations
    weight_levels: int  # the integer that a channel's largest weight maps to
    sides: int  # of a residual addition that are quantised: the skip side first
    integer_bias: bool = False
    one_scale: bool = False  # a weight, and the channels' shares of it after the convolution
    half: bool = False  # float16 where there is no int8


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    `backend` is "module:class". `package` is imported as that name; `distributions` may have installed it, and `extra`
    does. `int8_for` names the engines whose INT8 graphs it runs; `placement` is that of its own INT8 graph, which
    `calibrated_by` runs during the export. `plan_options` are the fields of `ExportOptions` that bear on the plans that
    it builds.
    """

    name: str
    title: str
    backend: str
    package: str
    distributions: tuple[str, ...]
    extra: str
    device: str
    precisions: tuple[Precision, ...]
    status: str
    int8_for: tuple[str, ...] = ()
    placement: Placement | None = None
    calibrated_by: str = ""
    plan_options: tuple[str, ...] = ()
    fused_heads: bool = False

    @property
    def builds_plans(self) -> bool:
        return bool(self.plan_options)

    def import_problem(self) -> str | None:
        """Import the engine's package; None, or the sentence that says why it cannot be and what to install."""
        return import_problem(self.package, self.extra)

    def load(self) -> type[Backend]:
        """Import the backend's class; its engine is imported by `missing` and `open`."""
        module, _, name = self.backend.partition(":")
        return getattr(import_module(module), name)


MEASURED = "measured on CPUs"
COMPILED = "built and compiled, not yet run on a card"
_FOLDER = "mgn_deploy.backends"

# In the order in which `auto` tries them: GPUs first, then OpenVINO, which is ahead of ONNX Runtime in INT8
# (benchmarks).
_ROWS = (
    Engine(
        name="tensorrt",
        title="TensorRT",
        backend=f"{_FOLDER}.tensorrt.runner:TensorRtBackend",
        package="tensorrt",
        distributions=("tensorrt",),
        extra="tensorrt",
        device="NVIDIA GPU",
        precisions=("fp32", "fp16", "bf16", "int8"),
        status="compiles against its API, not yet run on a card",
        int8_for=("tensorrt", "tensorrt-rtx"),
        placement=Placement(unsigned=False, weight_levels=127, sides=1),
        # ONNX Runtime on the CPU takes TensorRT's graphs too.
        calibrated_by="onnxruntime",
        plan_options=("batch", "workspace", "version_compatible", "hardware_compatible", "cache", "fused_heads"),
        fused_heads=True,
    ),
    Engine(
        name="tensorrt-rtx",
        title="TensorRT-RTX",
        backend=f"{_FOLDER}.tensorrt.runner:TensorRtRtxBackend",
        package="tensorrt_rtx",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx"),
        extra="tensorrt-rtx",
        device="NVIDIA GPU",
        precisions=("fp32", "fp16", "bf16", "int8"),
        status=COMPILED,
        int8_for=("tensorrt", "tensorrt-rtx"),
        placement=Placement(unsigned=False, weight_levels=127, sides=0, one_scale=True, half=True),
        calibrated_by="onnxruntime",
        plan_options=("batch", "compute_capabilities", "workspace", "cache", "fused_heads"),
        fused_heads=True,
    ),
    Engine(
        name="torch-cuda",
        title="PyTorch, CUDA graphs",
        backend=f"{_FOLDER}.torch_cuda.backend:TorchCudaBackend",
        package="torch",
        distributions=("torch",),
        extra="train",
        device="NVIDIA GPU",
        precisions=("fp32", "fp16", "bf16"),
        status="tested on CPUs as the same module, not yet run on a card",
        fused_heads=True,
    ),
    Engine(
        name="onnxruntime-cuda",
        title="ONNX Runtime, CUDA provider",
        backend=f"{_FOLDER}.onnxruntime.cuda:OnnxRuntimeCudaBackend",
        package="onnxruntime",
        distributions=("onnxruntime-gpu",),
        extra="gpu",
        device="NVIDIA GPU",
        precisions=("fp32", "fp16"),  # the provider has no integer convolutions, and would round around float32 ones
        status="not yet run on a card",
        fused_heads=True,
    ),
    Engine(
        name="openvino",
        title="OpenVINO",
        backend=f"{_FOLDER}.openvino:OpenVinoBackend",
        package="openvino",
        distributions=("openvino",),
        extra="cpu",
        device="CPU",
        precisions=("fp32", "fp16", "bf16", "int8"),
        status=MEASURED,
        int8_for=("openvino",),
        placement=Placement(unsigned=True, weight_levels=127, sides=1),
        calibrated_by="openvino",
    ),
    Engine(
        name="onnxruntime",
        title="ONNX Runtime",
        backend=f"{_FOLDER}.onnxruntime.cpu:OnnxRuntimeBackend",
        package="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        extra="cpu",
        device="CPU",
        precisions=("fp32", "fp16", "int8"),
        status=MEASURED,
        int8_for=("onnxruntime", "tensorrt", "tensorrt-rtx"),
        placement=Placement(unsigned=True, weight_levels=63, sides=2, integer_bias=True),
        calibrated_by="onnxruntime",
    ),
    Engine(
        name="torch",
        title="PyTorch eager, the reference",
        backend=f"{_FOLDER}.torch:TorchBackend",
        package="torch",
        distributions=("torch",),
        extra="train",
        device="CPU or NVIDIA GPU",
        precisions=("fp32",),
        status=MEASURED,
    ),
)
ENGINES: dict[str, Engine] = {row.name: row for row in _ROWS}
EXPORT_ENGINES = tuple(row.name for row in _ROWS if row.placement)  # what `export --engine` takes


def engine_row(name: str) -> Engine:
    """The row of a name.

    Raises:
        UserError: there is no such engine.
    """
    if name not in ENGINES:
        raise UserError(f"no backend {name!r}: choose auto, {', '.join(ENGINES)}")
    return ENGINES[name]
