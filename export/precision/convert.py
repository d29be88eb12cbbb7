"""From the float32 graph to the graph of the wanted precision, and what the manifest says of it."""

from __future__ import annotations

import logging

import numpy as np
import onnx

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.manifest import Quantisation
from mgn_deploy.config import ModelConfig
from mgn_deploy.datasets import Dataset
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun
from mgn_deploy.export.precision.calibration_images import CalibrationImages
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.int8 import Drop, agreement_drop, build_int8
from mgn_deploy.export.precision.profile import block_milliseconds
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.retrieval.validate import validate

_log = logging.getLogger("mgn_deploy")

RANGE_IMAGES = 64


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
    config: ModelConfig,
    engine: str,
    images: CalibrationImages,
    budget_crops: np.ndarray,
    data: Dataset | None,
    max_drop: float,
) -> tuple[onnx.ModelProto, Quantisation]:
    """Make the INT8 graph for an engine within the accuracy budget.

    Args:
        graph: float32, of the bundle.
        plain: the same without the mirror average.
        config: of the model.
        engine: one with a placement in the table of engines.
        images: to calibrate on.
        budget_crops: uint8 `[n, height, width, 3]`: without `data` the budget is about top-10 agreement on these.
        data: labelled queries and gallery: the budget is about their mAP.
        max_drop: points.

    Raises:
        CannotRun: the engine that runs the candidates is not installed.
        UserError: the budget cannot be kept.
    """
    row = ENGINES[engine]
    assert row.placement is not None
    runner = ENGINES[row.calibrated_by].load()
    reason = runner.missing()
    if reason:
        raise CannotRun(f"INT8 for {engine} is calibrated with {row.calibrated_by}: {reason}")

    def open_graph(model: onnx.ModelProto) -> Backend:
        return runner.open_graph(model.SerializeToString(), config)

    def milliseconds(model: onnx.ModelProto, pixels: np.ndarray) -> dict[str, float]:
        return block_milliseconds(model, pixels, row.calibrated_by)

    reference = open_graph(graph)
    drop = _map_drop(data, config, reference) if data else _agreement_drop(budget_crops, reference)
    made = build_int8(graph, plain, images.crops, row.placement, open_graph, drop, max_drop, milliseconds)
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


def _map_drop(data: Dataset, config: ModelConfig, reference: Backend) -> Drop:
    """Points of mAP that an engine loses against the float32 graph on the same engine."""

    def mean_ap(engine: Backend) -> float:
        return validate(data, Embedder(engine, config), None).measured.mAP

    before = mean_ap(reference)
    return lambda engine: 100 * (before - mean_ap(engine))
