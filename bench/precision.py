"""Precision x engine in one run: accuracy, distance from PyTorch, speed and size.

`python -m mgn_deploy.bench.precision --help`.

Speeds are taken in turns, one round over all engines after the other, and are medians: a shared machine's speed drifts.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

from mgn_deploy.backends.base import Backend
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.console import print_json, print_table, show_log
from mgn_deploy.datasets import Dataset, open_data
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.machine import cpu_features, cpu_name, usable_cpus

# Engine and precision, each a bundle of its own; PyTorch eager, the reference, comes first.
ROWS = (
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("onnxruntime", "int8"),
)
REFERENCE = ("torch", "fp32")
BATCHES = (1, 8)


def main(
    weights: Path = typer.Option(..., help="A weights folder."),
    data: str = typer.Option(..., help="KIND:DIR: accuracy on its query and gallery."),
    calib: Path = typer.Option(..., help="Folder of images to calibrate INT8 on."),
    images: int = typer.Option(64, min=8, help="Images a timed run."),
    rounds: int = typer.Option(5, min=1, help="Timed rounds."),
    accuracy: bool = typer.Option(
        True, help="Rank query and gallery with each; int8's budget is then about their mAP."
    ),
    max_drop: float = typer.Option(0.5, min=0, help="Points that int8 may lose: of mAP, or of top-10 agreement."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure every precision and engine of one model."""
    show_log()
    dataset = open_data(data)
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-bench-") as scratch:
        engines = _open_all(weights, dataset, calib, accuracy, max_drop, Path(scratch))
        table = [describe(name, embedder) for name, embedder in engines.items()]
        _add_speed(table, list(engines.values()), dataset, images, rounds)
    config = next(iter(engines.values())).bundle.config
    result = {
        "model": f"{config.backbone} MGN {config.height}x{config.width}, base width {config.base_width}",
        "machine": f"{cpu_name()}, {usable_cpus()} CPUs ({' '.join(cpu_features())})",
        "rows": table,
    }
    if as_json:
        print_json(result)
    else:
        keys = list(table[0])
        print_table(
            keys, [[_cell(row[key]) for key in keys] for row in table], title=f"{result['model']}, {result['machine']}"
        )


def _open_all(
    weights: Path, dataset: Dataset, calib: Path, accuracy: bool, max_drop: float, scratch: Path
) -> dict[tuple[str, str], Embedder]:
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions

    engines: dict[tuple[str, str], Embedder] = {}
    for engine, precision in ROWS:
        _log.info(f"== {engine} {precision}")
        int8 = precision == "int8"
        options = ExportOptions(
            precision=precision,  # type: ignore[arg-type]
            engine=engine,
            calib=calib if precision in ("int8", "fp16") else None,
            data=dataset if accuracy else None,
            max_drop=max_drop if int8 else None,
            proof_images=dataset.root / "query",
        )
        bundle = export_bundle(weights, scratch / f"{engine}-{precision}", options)
        if REFERENCE not in engines:
            engines[REFERENCE] = Embedder.open_reference(bundle)
        engines[engine, precision] = Embedder.open(bundle, engine, allow_unproven=True)
    return engines


def describe(name: tuple[str, str], embedder: Embedder) -> dict[str, Any]:
    """Engine and precision, the graph's size, and how far from PyTorch its proof found it."""
    proof = embedder.bundle.manifest.proofs[name[0]]
    row = {
        "engine": name[0],
        "precision": name[1],
        "MB": round(embedder.bundle.manifest.files[GRAPH].size / 1e6, 1) if name != REFERENCE else None,
        "mean cosine": proof.mean_cosine,
        "worst cosine": proof.worst_cosine,
        "top-10": proof.top10_agreement,
    }
    if proof.ranking:
        row |= {"rank-1": 100 * proof.ranking.rank1, "mAP": 100 * proof.ranking.mAP}
        row["mAP kept"] = 100 * proof.ranking.mAP / proof.ranking.reference_mAP
    return row


def _add_speed(
    table: list[dict[str, Any]], engines: list[Embedder], dataset: Dataset, images: int, rounds: int
) -> None:
    height, width = engines[0].height, engines[0].width
    chosen = [dataset.gallery[index % len(dataset.gallery)].path for index in range(images)]
    crops = np.stack([read_crop(path, height, width) for path in chosen])
    rates: dict[tuple[int, int], list[float]] = {}
    for turn in range(rounds + 1):
        for index, embedder in enumerate(engines):
            for batch in BATCHES:
                rate = images / _seconds(embedder.backend, crops, batch)
                if turn:
                    rates.setdefault((index, batch), []).append(rate)
        _log.info(f"round {turn}/{rounds}{'' if turn else ' (not counted)'}")
    for index, row in enumerate(table):
        for batch in BATCHES:
            row[f"img/s b{batch}"] = statistics.median(rates[index, batch])
            ratios = [one / eager for one, eager in zip(rates[index, batch], rates[0, batch], strict=True)]
            row[f"x torch b{batch}"] = statistics.median(ratios)


def _seconds(backend: Backend, crops: np.ndarray, batch: int) -> float:
    start = time.perf_counter()
    for at in range(0, len(crops), batch):
        backend(np.ascontiguousarray(crops[at : at + batch]))
    return time.perf_counter() - start


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)

_log = logging.getLogger("mgn_deploy")
