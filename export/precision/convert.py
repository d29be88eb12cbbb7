"""From the float32 graph to the graph of the wanted precision, and what the manifest says of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import backend_module
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import Manifest, Quantisation
from mgn_deploy.datasets import Dataset
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun
from mgn_deploy.export.precision import quantise
from mgn_deploy.export.precision.calibration_images import CalibrationImages
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.int8 import Drop, agreement_drop, build_int8
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.retrieval.validate import validate

_log = logging.getLogger("mgn_deploy")

RANGE_IMAGES = 64


class Int8Engine(NamedTuple):
    """Where Q/DQ pairs stand for an engine, the backend that runs the candidates, and the backends that are proven with the graph."""

    placement: quantise.Placement
    runner: str
    backends: tuple[str, ...]


# Candidates of TensorRT's graphs run by ONNX Runtime on the CPU, which takes them, too. No graph is for `onnxruntime_cuda`: that
# provider has no integer convolutions, and would round around float32 ones.
ENGINES = {
    "openvino": Int8Engine(quantise.OPENVINO, "openvino", ("openvino",)),
    "onnxruntime": Int8Engine(quantise.ONNXRUNTIME, "onnxruntime", ("onnxruntime",)),
    "tensorrt": Int8Engine(quantise.TENSORRT, "onnxruntime", ("tensorrt", "tensorrt_rtx", "onnxruntime")),
    "tensorrt-rtx": Int8Engine(quantise.TENSORRT_RTX, "onnxruntime", ("tensorrt", "tensorrt_rtx", "onnxruntime")),
}


@dataclass(frozen=True)
class GraphInMemory(Bundle):
    """A bundle whose graph is not on disk yet: for candidates."""

    graph: bytes

    def read(self, name: str) -> bytes:
        return self.graph


def to_half_precision(graph: onnx.ModelProto, precision: str, crops: np.ndarray) -> onnx.ModelProto:
    """The graph in fp16 or bf16; ranges are looked at on at most 64 of the crops."""
    if precision == "bf16":
        return to_half(graph, precision, {})[0]
    seen = crops[:: -(-len(crops) // RANGE_IMAGES)]
    _log.info(f"looking at the activations' ranges on {len(seen)} images")
    return to_half(graph, precision, measure_ranges(graph, seen))[0]


def to_int8(
    graph: onnx.ModelProto,
    plain: onnx.ModelProto,
    manifest: Manifest,
    engine: str,
    images: CalibrationImages,
    budget_crops: np.ndarray,
    data: Dataset | None,
    max_drop: float,
) -> tuple[onnx.ModelProto, Quantisation]:
    """The INT8 graph for an engine within the accuracy budget.

    Args:
        graph: float32, of the bundle.
        plain: the same without the mirror average.
        manifest: the bundle's, for the model's input size.
        engine: one of `ENGINES`.
        images: to calibrate on.
        budget_crops: where there is no `data`, top-10 agreement on these is what the budget is about.
        data: labelled queries and gallery: the budget is about their mAP.
        max_drop: points.

    Raises:
        CannotRun: the engine, or ONNX Runtime in TensorRT's place, is not installed.
        UserError: the budget cannot be kept.
    """
    placement, runner, _ = ENGINES[engine]
    module = backend_module(runner)
    reason = module.missing()
    if reason:
        raise CannotRun(f"INT8 for {engine} is calibrated with {runner}: {reason}")

    def open_graph(model: onnx.ModelProto) -> Backend:
        return module.open_engine(GraphInMemory(Path(), manifest, model.SerializeToString()))

    drop = _map_drop(data, manifest, open_graph(graph)) if data else _agreement_drop(budget_crops, open_graph(graph))
    made = build_int8(graph, plain, images.crops, placement, open_graph, drop, max_drop)
    drop_of = "mAP" if data else "top-10 agreement"
    _log.info(
        f"INT8 by {made.method}: {made.drop:.2f} points of {drop_of} lost, {len(made.in_float)} blocks left in float"
    )
    return made.graph, Quantisation(
        engine=engine,
        method=made.method,
        errors=made.errors,
        images=len(images.crops),
        image_source=images.source,
        images_sha256=images.sha256,
        max_drop=max_drop,
        drop=made.drop,
        drop_of=drop_of,
        sweep=made.sweep,
        in_float=made.in_float,
    )


def _agreement_drop(crops: np.ndarray, reference: Backend) -> Drop:
    return agreement_drop(crops, run_in_batches(reference, crops))


def _map_drop(data: Dataset, manifest: Manifest, reference: Backend) -> Drop:
    """Points of mAP that an engine loses against the float32 graph on the same engine."""
    bundle = GraphInMemory(data.root, manifest, b"")

    def mean_ap(engine: Backend) -> float:
        return validate(data, Embedder(bundle, engine), None).measured.mAP

    before = mean_ap(reference)
    return lambda engine: 100 * (before - mean_ap(engine))
