"""The fused heads against PyTorch's and TensorRT's on a GPU: if they are right, how fast, how near to the hardware.

`python -m mgn_deploy.bench.kernel --out FILE` measures the paper's heads (2048 channels to 256, maps of 12x4 and 24x8)
in float16, bfloat16 and float32, NHWC and NCHW, for 1 to 512 images, with features or embeddings as the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mgn_deploy.console import print_json, print_table, show_log
from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file
from mgn_deploy.packages import import_problem

SHOWN = (1, 8, 64, 512)  # images, of all that are in the JSON
# The pipeline launches the kernel inside a CUDA graph; what it takes launched by itself is in the JSON.
HEADLINE = "kernel_graph"
COLUMNS = ("case", "images", "floor us", "kernel us", "warm us", "of copy", "x floor", "error", "share")
RIVALS = {
    "eager_graph": "eager",
    "compiled_graph": "compiled",
    "lean_compiled_graph": "lean comp.",
    "eager": "eager, no graph",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return 0 if all is measured, 1 if something failed or was wrong, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m mgn_deploy.bench.kernel", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON of everything, written again after each case")
    parser.add_argument("--minutes", type=float, default=30, help="no case is begun after that time (30)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    show_log()
    chosen = parser.parse_args(arguments)
    problem = gpu_problem() or import_problem("torch", "train") or _torch_problem()
    if problem:
        print(f"the kernel is measured on a GPU: {problem}", file=sys.stderr)
        return 2
    from mgn_deploy.bench.kernel.run import run

    def save(result: dict[str, Any]) -> None:
        if chosen.out:
            with atomic_file(chosen.out) as file:
                file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")

    try:
        result = run(chosen.minutes, save)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if chosen.json:
        print_json(result)
    else:
        title, rows = table(result)
        print_table([*COLUMNS, *RIVALS.values()], rows, title)
        for sentence in remarks(result):
            print(sentence)
    return 1 if faults(result) or "stopped" in result else 0


def _torch_problem() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees none (is it a build for the CPU?)"


def table(result: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Make the title and the rows for people: times in us with the L2 cache emptied, the rivals' over the kernel's.

    All are in CUDA graphs but where a column says otherwise.
    """
    limits, gpu = result["ceilings"], result["machine"]["gpu"]
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in limits["operations_per_second"].items())
    title = (
        f"{gpu}: copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, matrix products {rates} TFLOP/s; in CUDA graphs"
    )
    shown = [row for row in result["cases"] if row["images"] in SHOWN and "contenders" in row]
    return title, [_cells(row) for row in shown]


def _cells(row: dict[str, Any]) -> list[str]:
    ours = row["contenders"].get(HEADLINE, {})
    case = f"{row['dtype']} {row['layout']} {row['output'].partition('_')[0]}"
    cells = [case, str(row["images"]), f"{row['floor_us']:.1f}"]
    for key, form in (("cold_us", ".1f"), ("warm_us", ".1f"), ("of_copy", ".0%"), ("over_floor", ".2f")):
        cells.append(format(ours[key], form) if key in ours else "-")
    cells.append(f"{ours['error']:.1e}" if "error" in ours else "-")
    cells.append(f"{ours['of_network']:.1%}" if "of_network" in ours else "-")
    for rival in RIVALS:
        theirs = row["contenders"].get(rival, {})
        both = "cold_us" in ours and "cold_us" in theirs
        cells.append(f"{theirs['cold_us'] / ours['cold_us']:.1f}x" if both else "-")
    return cells


def faults(result: dict[str, Any]) -> list[str]:
    """List what failed, is wrong, or is the kernel's and gave other bits the second time."""
    found = []
    for row in result["cases"]:
        name = f"{row['dtype']} {row['layout']} {row['output']} {row['images']}"
        if "failed" in row:
            found.append(f"{name}: {row['failed']}")
        for who, one in {**row.get("contenders", {}), "network": row.get("network", {})}.items():
            problem = one.get("failed") or one.get("wrong")
            if not problem and who.startswith("kernel") and not one["bit_equal"]:
                problem = "two runs differ"
            if problem:
                found.append(f"{name}, {who}: {problem}")
    return found


def remarks(result: dict[str, Any]) -> list[str]:
    """Say what the table does not."""
    said = [f"{who} is left out: {why}" for who, why in result["left_out"].items()]
    if result["not_begun"]:
        said.append(f"{len(result['not_begun'])} cases were not begun: --minutes were over, or the GPU was lost")
    if "stopped" in result:
        said.append(f"stopped: {result['stopped']}")
    wrong = faults(result)
    return [*said, *wrong[:10], *([f"and {len(wrong) - 10} more like these"] if len(wrong) > 10 else [])]


if __name__ == "__main__":
    sys.exit(main())
