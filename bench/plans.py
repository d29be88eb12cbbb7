"""TensorRT-RTX plans of one model, built here without a GPU: size, time, and what the layer tables say.

`python -m mgn_deploy.bench.plans WEIGHTS --compute-capability 8.6,8.9,12.0`. No plan is run.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgn_deploy.bench.report import cpu
from mgn_deploy.console import print_json, print_table, show_log
from mgn_deploy.errors import UserError
from mgn_deploy.packages import require_training

if TYPE_CHECKING:
    import onnx

    from mgn_deploy.train.model import MGN

DRAWN_IMAGES = 8  # for the ranges, which say what float16 cannot hold
COLUMNS = ("graph", "GPU", "MB", "weights MB", "seconds", "layers", "convolutions", "additions in them", "moved MB")
MEANING = (
    "weights: what the graph holds of them; moved: activations that all layers read and write for one row of the "
    "batch, which is an "
    "image or its mirror"
)
ITEM_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1, "Int32": 4, "Int64": 8}


def main(arguments: list[str] | None = None) -> int:
    """0: all is built; 2: it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.plans", description=__doc__)
    parser.add_argument("weights", type=Path, help="a weights folder")
    parser.add_argument("--compute-capability", default="8.6,8.9,12.0", help="as 8.6,8.9,12.0, which is the default")
    parser.add_argument("--batch", default="1,32,64", help="min, opt and max images a call (1,32,64)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    show_log()
    chosen = parser.parse_args(arguments)
    try:
        result = run(chosen.weights, chosen.compute_capability, chosen.batch)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if chosen.json:
        print_json(result)
    else:
        title = f"{result['model']}, batch {chosen.batch}, TensorRT-RTX {result['version']}, on {result['machine']}"
        print_table(COLUMNS, [_cells(row) for row in result["plans"]], title)
        print(MEANING)
    return 0


def run(weights: Path, capabilities: str, batch: str) -> dict[str, Any]:
    """Build a plan of each precision's graph for each compute capability.

    Raises:
        CannotRun: PyTorch or TensorRT-RTX is not installed.
        UserError: no weights, or settings that it cannot build for.
    """
    require_training()
    from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans
    from mgn_deploy.bench import layer_table
    from mgn_deploy.export.options import parse_batch, parse_capabilities
    from mgn_deploy.train.weights import load_weights

    settings, wanted = BuildSettings("tensorrt-rtx", parse_batch(batch)), parse_capabilities(capabilities)
    if not wanted:
        raise UserError(f"--compute-capability {capabilities}: name at least one, as in 8.6,8.9,12.0")
    model = load_weights(weights)
    rows, version = [], ""
    for name, graph in _graphs(model):
        for plan in build_plans(graph, settings, wanted, use_cache=False):
            layers = layer_table.layers_from_log(plan.layers)
            facts = layer_table.summary(layers, graph)
            row = {
                "graph": name,
                "compute_capability": plan.settings.compute_capability,
                "bytes": len(plan.content),
                "weights_bytes": sum(len(tensor.raw_data) for tensor in graph.graph.initializer),
                "seconds": round(plan.seconds, 2),
                **facts,
                "moved_bytes": moved_bytes(layers),
            }
            rows.append(row)
            version = plan.version
            _log.info(f"{name}: {plan.file_name} in {plan.seconds:.1f} s")
    config = model.config
    return {
        "model": f"{config.backbone} MGN {config.height}x{config.width}, base width {config.base_width}",
        "machine": cpu(),
        "version": version,
        "batch": settings.batch,
        "plans": rows,
    }


def moved_bytes(layers: Sequence[dict[str, Any]]) -> int:
    """Of activations, read and written by all layers, for one row of the batch."""
    tensors = [tensor for layer in layers for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ()))]
    return sum(math.prod(max(size, 1) for size in one["Dimensions"]) * ITEM_BYTES[one["Datatype"]] for one in tensors)


def _graphs(model: MGN) -> Iterator[tuple[str, onnx.ModelProto]]:
    """By name: each precision's, and INT8 as full TensorRT gets it, for comparison."""
    import numpy as np
    import torch
    from PIL import Image

    from mgn_deploy.backends.registry import ENGINES
    from mgn_deploy.datasets.drawn import draw_people
    from mgn_deploy.export.graph.trace import build_graph
    from mgn_deploy.export.precision.half import to_half
    from mgn_deploy.export.precision.quantise import quantise
    from mgn_deploy.export.precision.ranges import measure_ranges
    from mgn_deploy.export.precision.thresholds import thresholds
    from mgn_deploy.images.decode import read_crop
    from mgn_deploy.train.weights import add_noise

    firsts = [next(branch.parameters()) for branch in model.branches]
    if all(torch.equal(firsts[0], other) for other in firsts[1:]):
        _log.info("the weights are untrained: noise makes their branches differ, as training does")
        add_noise(model)
    graph = build_graph(model)
    size = model.config.height, model.config.width
    crops = np.stack([read_crop(Image.fromarray(person), *size) for person in draw_people(DRAWN_IMAGES)])
    ranges = measure_ranges(graph, crops)
    yield "fp32", graph
    for precision in ("fp16", "bf16"):
        yield precision, to_half(graph, precision, ranges)[0]
    for name, engine in (("int8", "tensorrt-rtx"), ("int8 as for tensorrt", "tensorrt")):
        placement = ENGINES[engine].placement
        assert placement is not None
        yield name, quantise(graph, ranges, thresholds(ranges, "max"), placement)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["graph"],
        f"sm_{row['compute_capability'].replace('.', '')}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['weights_bytes'] / 1e6:.1f}",
        f"{row['seconds']:.1f}",
        str(row["layers"]),
        ", ".join(f"{count} {kind}" for kind, count in row["convolutions"].items()),
        f"{row['additions_in_convolutions']} of {row['additions']}",
        f"{row['moved_bytes'] / 1e6:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())

_log = logging.getLogger("mgn_deploy")
