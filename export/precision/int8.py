"""INT8 that keeps the ranking: calibrate, take the best method, correct the biases where that helps, and put those
blocks back to float that err most for the time that they save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx

from mgn_deploy.backends.base import Backend
from mgn_deploy.bundle.manifest import BlockError
from mgn_deploy.errors import UserError
from mgn_deploy.export.graph.rewrite import pixels_name
from mgn_deploy.export.precision.quantise import Placement, conv_groups, quantise
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.precision.thresholds import METHODS, thresholds
from mgn_deploy.export.proof.agreement import cosines, run_in_batches, top_agreement
from mgn_deploy.export.proof.proof import NEIGHBOURS

_log = logging.getLogger("mgn_deploy")

# Runs an ONNX graph: the engine that the bundle is for, or a stand-in where that cannot run here.
OpenGraph = Callable[[onnx.ModelProto], Backend]
# Of embeddings by a candidate graph's engine: points lost, of mAP or of top-10 agreement.
Drop = Callable[[Backend], float]

# Milliseconds an image of each block of a graph, on these images.
Milliseconds = Callable[[onnx.ModelProto, np.ndarray], Mapping[str, float]]

HELD_OUT = 0.2  # of the calibration images, to choose the method by
SWEEP_IMAGES, TIMED_IMAGES = 32, 8  # a block: a ResNet-50 MGN has 33 of them
LEAST_MILLISECONDS = 1e-3  # of a block that INT8 makes no faster: it goes back first
CORRECTED = "+bias"  # after a method's name: with corrected biases


@dataclass
class Int8:
    """An INT8 graph and how it came about, as in `Quantisation`; in `sweep` those blocks come first that err most for
    each millisecond that they save."""

    graph: onnx.ModelProto
    method: str
    errors: dict[str, float]
    drop: float
    sweep: list[BlockError] = field(default_factory=list)
    in_float: list[str] = field(default_factory=list)


def build_int8(
    graph: onnx.ModelProto,
    plain: onnx.ModelProto,
    crops: np.ndarray,
    placement: Placement,
    open_graph: OpenGraph,
    drop: Drop,
    max_drop: float,
    milliseconds: Milliseconds,
) -> Int8:
    """Quantise `graph` within an accuracy budget.

    Args:
        graph: float32, of the bundle.
        plain: the same model without the mirror average: calibrating on it looks at each image once.
        crops: calibration images, uint8 `[n, height, width, 3]`, in random order.
        placement: of the Q/DQ pairs.
        open_graph: runs a candidate.
        drop: points lost by a candidate.
        max_drop: points that may be lost.
        milliseconds: of each block, by the same engine.

    Raises:
        UserError: no graph with at least one block in INT8 keeps the budget.
    """
    held_out = crops[: max(1, round(len(crops) * HELD_OUT))]
    seen = crops[len(held_out) :]
    _log.info(f"calibrating on {len(seen)} images, {len(held_out)} held out")
    ranges = measure_ranges(plain, seen, histograms=True)
    ranges[pixels_name(graph)] = ranges[pixels_name(plain)]
    reference = run_in_batches(open_graph(plain), held_out)

    limits = {method: thresholds(ranges, method) for method in METHODS}

    def candidate(source: onnx.ModelProto, method: str, in_float: Collection[str] = ()) -> onnx.ModelProto:
        by, corrected = method.removesuffix(CORRECTED), method.endswith(CORRECTED)
        return quantise(source, ranges, limits[by], placement, in_float, correct_bias=corrected)

    def error(model: onnx.ModelProto, images: int = len(held_out)) -> float:
        return float(1 - cosines(run_in_batches(open_graph(model), held_out[:images]), reference[:images]).mean())

    errors = {method: error(candidate(plain, method)) for method in METHODS}
    best = min(errors, key=lambda name: errors[name])
    errors[best + CORRECTED] = error(candidate(plain, best + CORRECTED))
    method = min(errors, key=lambda name: errors[name])
    _log.info(
        "mean 1 - cosine on the held-out images: " + ", ".join(f"{name} {value:.2e}" for name, value in errors.items())
    )
    chosen = candidate(graph, method)
    result = Int8(chosen, method, errors, drop(open_graph(chosen)))
    if result.drop > max_drop:
        _log.info(
            f"INT8 everywhere loses {result.drop:.2f} points, more than {max_drop}: looking for the blocks that lose "
            "most for the time that they save"
        )
        groups, timed = conv_groups(plain), held_out[:TIMED_IMAGES]
        before, after = milliseconds(plain, timed), milliseconds(candidate(plain, method), timed)
        for name in groups:
            alone = candidate(plain, method, [other for other in groups if other != name])
            saved = before.get(name, 0.0) - after.get(name, 0.0)
            result.sweep.append(BlockError(block=name, error=error(alone, SWEEP_IMAGES), milliseconds=saved))
        result.sweep.sort(key=lambda row: -row.error / max(row.milliseconds, LEAST_MILLISECONDS))
        for row in result.sweep:
            _log.info(
                f"  {row.block} alone in INT8: 1 - cosine {row.error:.1e}, saves {row.milliseconds:.2f} ms an image"
            )
        _put_back(result, max_drop, partial(candidate, graph, method), lambda graph: drop(open_graph(graph)))
    return result


def _put_back(
    result: Int8,
    max_drop: float,
    candidate: Callable[[Collection[str]], onnx.ModelProto],
    points: Callable[[onnx.ModelProto], float],
) -> None:
    """The fewest of the first blocks in float with which the budget holds, by bisection over how many."""
    worst = [row.block for row in result.sweep]
    low, high = 0, len(worst)  # `low` misses the budget; `high` is float32 altogether
    while high - low > 1:
        middle = (low + high) // 2
        graph = candidate(worst[:middle])
        lost = points(graph)
        _log.info(f"{middle} of {len(worst)} blocks in float: {lost:.2f} points lost")
        if lost <= max_drop:
            high, result.graph, result.drop, result.in_float = middle, graph, lost, worst[:middle]
        else:
            low = middle
    if result.drop > max_drop:
        raise UserError(
            f"no INT8 graph loses at most {max_drop} points: even one block in INT8 loses more; raise --max-drop, or "
            "calibrate on more images like those that it will see"
        )


def agreement_drop(crops: np.ndarray, reference: np.ndarray) -> Drop:
    """Points of top-10 agreement with the reference's embeddings `[n, dim]` of these crops."""
    return lambda engine: 100 * (1 - top_agreement(run_in_batches(engine, crops), reference, NEIGHBOURS))
