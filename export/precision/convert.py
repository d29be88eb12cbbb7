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
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.int8 import Drop, agreement_drop, build_int8
from mgn_deploy.export.precision.profile import block_milliseconds
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.export.proof.proof import Pixels
from mgn_deploy.files import sha256_bytes
from mgn_deploy.retrieval.validate import validate
from mgn_deploy.train.model import MGN

_log = logging.getLogger("mgn_deploy")

RANGE_IMAGES = 64
BUDGET_IMAGES = 128  # of the calibration images, where there are no real ones to prove on


def graph_in_precision(
    model: MGN, options: ExportOptions, pixels: Pixels, calibration: Pixels | None
) -> tuple[onnx.ModelProto, Quantisation | None]:
    """Make the graph of a model in the precision that the options name, and tell how an INT8 one was made.

    Args:
        model: trained weights; not changed.
        options: of the export.
        pixels: that the bundle is proven on; without `data` INT8's budget is about their top-10 agreement.
        calibration: images to calibrate INT8 on; FP16's ranges are measured on them too, without them on `pixels`.

    Raises:
        CannotRun: the engine that runs the INT8 candidates is not installed.
        UserError: the INT8 budget cannot be kept.
    """
    graph = build_graph(model, options.flip)
    if options.precision == "fp32":
        return graph, None
    if options.precision == "bf16":
        return to_half(graph, "bf16", {}), None
    if options.precision == "int8":
        assert calibration is not None  # ExportOptions refuses INT8 without
        return _to_int8(graph, model, options, pixels, calibration)
    crops = (calibration or pixels).crops
    seen = crops[:: -(-len(crops) // RANGE_IMAGES)]
    _log.info(f"looking at the activations' ranges on {len(seen)} images")
    return to_half(graph, "fp16", measure_ranges(graph, seen)), None


def _to_int8(
    graph: onnx.ModelProto, model: MGN, options: ExportOptions, pixels: Pixels, images: Pixels
) -> tuple[onnx.ModelProto, Quantisation]:
    row = ENGINES[options.int8_engine]
    assert row.placement is not None
    runner = ENGINES[row.calibrated_by].load()
    reason = runner.missing()
    if reason:
        raise CannotRun(f"INT8 for {row.name} is calibrated with {row.calibrated_by}: {reason}")

    def open_graph(candidate: onnx.ModelProto) -> Backend:
        return runner.open_graph(candidate.SerializeToString(), model.config)

    def milliseconds(candidate: onnx.ModelProto, crops: np.ndarray) -> dict[str, float]:
        return block_milliseconds(candidate, crops, row.calibrated_by)

    reference = open_graph(graph)
    if options.data:
        drop, drop_of = _map_drop(options.data, model.config, reference), "mAP"
    else:
        crops = images.crops[:BUDGET_IMAGES] if pixels.drawn else pixels.crops
        _log.info(f"INT8's budget is about the neighbours of {len(crops)} images: --data holds it on labelled people")
        drop, drop_of = agreement_drop(crops, run_in_batches(reference, crops)), "top-10 agreement"
    plain = build_graph(model, flip=False) if options.flip else graph
    budget = options.int8_budget
    made = build_int8(graph, plain, images.crops, row.placement, open_graph, drop, budget, milliseconds)
    _log.info(
        f"INT8 by {made.method}: {made.drop:.2f} points of {drop_of} lost, {len(made.in_float)} blocks left in float"
    )
    return made.graph, Quantisation(
        engine=row.name,
        images=len(images.crops),
        image_source=images.source,
        images_sha256=sha256_bytes(images.crops.tobytes()),
        max_drop=budget,
        drop_of=drop_of,
        **{key: value for key, value in vars(made).items() if key != "graph"},
    )


def _map_drop(data: Dataset, config: ModelConfig, reference: Backend) -> Drop:
    """Points of mAP that an engine loses against the float32 graph on the same engine."""

    def mean_ap(engine: Backend) -> float:
        return validate(data, Embedder(engine, config), None).measured.mAP

    before = mean_ap(reference)
    return lambda engine: 100 * (before - mean_ap(engine))
