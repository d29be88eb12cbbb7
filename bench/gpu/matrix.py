"""Every precision and GPU engine, with and without fused heads, into one JSON.

`python -m mgn_deploy.bench.gpu.matrix --out FILE`.

A row is one of them: its proof, the sizes of graph and plan, images/s and latency at batch 1, 8 and 32 in turns with
PyTorch (`turns.py`). The file is rewritten after each row, so that a run that is ended keeps them. What
cannot run is a row with the reason. `--engines openvino,onnxruntime` runs the same code without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mgn_deploy.backends.registry import ENGINES as TABLE
from mgn_deploy.console import show_log
from mgn_deploy.cuda.device import this_gpu
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.packages import require_training

# What matters most first: a run whose time is up has it.
PRECISIONS = ("fp16", "fp32", "int8", "bf16")
ENGINES = tuple(row.name for row in TABLE.values() if row.fused_heads)


class Cell(NamedTuple):
    """A row to come. `placement` is whose INT8 graph it is, None of a graph without Q/DQ pairs."""

    precision: str
    fused_heads: bool
    placement: str | None
    engine: str

    @property
    def graph(self) -> tuple[str, bool, str | None]:
        """What cells with the same bundle share."""
        return self.precision, self.fused_heads, self.placement


def main(arguments: list[str] | None = None) -> int:
    """0: what can run here is measured; 1: something failed or missed a floor of its proof; 2: nothing could run."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.gpu.matrix", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON")
    parser.add_argument("--weights", type=Path, help="a weights folder (a ResNet-50 MGN with random weights)")
    parser.add_argument("--data", help="KIND:DIR: each proof also ranks its query and gallery")
    parser.add_argument("--calib", type=Path, help="folder of images to calibrate INT8 on (drawn people)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="which, in that order (all)")
    parser.add_argument("--engines", default=",".join(ENGINES), help="backends (the GPU's)")
    parser.add_argument("--batches", default="1,8,32", help="images a call (1,8,32)")
    parser.add_argument("--max-drop", type=float, help="points INT8 may lose (0.5; any with random weights)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do without torch.compile, which compiles for minutes"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds a row, fewer where time is short (7)")
    parser.add_argument("--budget", type=float, default=3600, help="seconds; no row is begun that may not end in time")
    show_log()
    chosen = parser.parse_args(arguments)
    chosen.precisions = chosen.precisions.split(",")
    chosen.engines = chosen.engines.split(",")
    chosen.batches = [int(size) for size in chosen.batches.split(",")]
    for given, known in ((chosen.precisions, PRECISIONS), (chosen.engines, tuple(set(TABLE) - {"torch"}))):
        if not set(given) <= set(known):
            parser.error(f"{','.join(given)}: choose from {', '.join(sorted(known))}")

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded

    def save(result: dict[str, Any]) -> None:
        with atomic_file(chosen.out) as file:
            file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")

    try:
        require_training()
        from mgn_deploy.bench.gpu.rows import Matrix

        with tempfile.TemporaryDirectory(prefix="mgn-deploy-matrix-") as scratch:
            rows = Matrix(chosen, Path(scratch), save).run()["rows"]
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    kinds = {
        "speed": "measured",
        "failed": "failed",
        "missed": "below a floor",
        "left_out": "left out",
        "not_begun": "not begun",
    }
    counts = {key: sum(key in row for row in rows) for key in kinds}
    print(f"{len(rows)} rows: " + ", ".join(f"{counts[key]} {kind}" for key, kind in kinds.items()))
    return 1 if counts["failed"] or counts["missed"] else 0 if counts["speed"] else 2


def cells(precisions: list[str], engines: list[str]) -> list[Cell]:
    """In the order in which they are measured; neighbours with the same graph share a bundle."""
    found = []
    for precision in precisions:
        for fused_heads in (False, True) if precision == "fp16" else (False,):
            able = [one for one in engines if TABLE[one].fused_heads or not fused_heads]
            row = [
                Cell(precision, fused_heads, placement_for(one) if precision == "int8" else None, one) for one in able
            ]
            found += sorted(row, key=lambda cell: str(cell.placement))
    return found


def placement_for(engine: str) -> str | None:
    """Whose INT8 graph that engine runs: its own, or one that is for it, too. None: no INT8 graph is for it."""
    row = TABLE[engine]
    return engine if row.placement else next(iter(row.int8_for), None)


def engine_problem(engine: str) -> str | None:
    """Why that backend cannot run here, or None."""
    from mgn_deploy.backends.tensorrt.builder import capabilities

    problem = TABLE[engine].load().missing()
    if problem or engine != "tensorrt-rtx" or this_gpu().compute_capability in capabilities():
        return problem
    return f"it builds for compute capability {', '.join(capabilities())}, not for {this_gpu().compute_capability}"


if __name__ == "__main__":
    sys.exit(main())
