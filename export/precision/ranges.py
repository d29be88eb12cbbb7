"""What the tensors of a float32 graph hold on real images: their largest magnitudes, and histograms of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from mgn_deploy.errors import UserError
from mgn_deploy.export.graph.rewrite import pixels_name, trunk_nodes

BINS = 2048
BATCH = 8


@dataclass
class TensorRange:
    """`largest` magnitude, whether any value is negative, and a histogram of magnitudes over 0..`largest`, float64
    `[2048]`.

    The histogram counts only what is not zero: zeros, of which ReLU leaves many, are exact at any scale. `mean` is the
    average over the images, float64 `[C, H, W]`.
    """

    largest: float = 0.0
    negative: bool = False
    histogram: np.ndarray | None = None
    mean: np.ndarray | None = None


def measure_ranges(
    graph: onnx.ModelProto,
    crops: np.ndarray,
    *,
    histograms: bool = False,
) -> dict[str, TensorRange]:
    """Run the graph by ONNX Runtime and look at every activation between the pixels and the maps.

    Args:
        graph: float32, as `build_graph` makes it.
        crops: uint8 `[n, height, width, 3]`.
        histograms: also count magnitudes, in a second pass, and average.

    Returns:
        By tensor name.

    Raises:
        UserError: with `histograms`, activations that are not finite.
    """
    names = [pixels_name(graph), *(output for node in trunk_nodes(graph) for output in node.output)]
    ranges = {name: TensorRange(histogram=np.zeros(BINS) if histograms else None) for name in names}
    for values in _run(graph, names, crops):
        for name, value in zip(names, values, strict=True):
            one = ranges[name]
            largest = float(np.abs(value).max())
            one.largest = max(one.largest, float("inf") if np.isnan(largest) else largest)
            if histograms and not np.isfinite(largest):
                raise UserError(f"{name} of the graph is not finite on these images: train the weights again")
            one.negative = one.negative or bool(value.min() < 0)
            if histograms:
                total = value.sum(axis=0, dtype=np.float64) / len(crops)
                one.mean = total if one.mean is None else one.mean + total
    if not histograms:
        return ranges
    for values in _run(graph, names, crops):
        for name, value in zip(names, values, strict=True):
            one = ranges[name]
            if one.largest > 0:
                magnitudes = np.abs(value[value != 0])
                one.histogram += np.histogram(magnitudes, BINS, (0, one.largest))[0]
    return ranges


def _run(graph: onnx.ModelProto, names: Sequence[str], crops: np.ndarray) -> Iterator[list[np.ndarray]]:
    import onnxruntime

    exposed = onnx.ModelProto()
    exposed.CopyFrom(graph)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for at in range(0, len(crops), BATCH):
        batch = np.ascontiguousarray(crops[at : at + BATCH])
        yield session.run(list(names), {"images": batch})
