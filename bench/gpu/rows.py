"""The rows of `bench/gpu/matrix.py`: bundles exported and proven, engines opened and timed, one after the other."""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mgn_deploy.backends.tensorrt.plans import plan_for
from mgn_deploy.backends.tensorrt.runner import TensorRtBackend
from mgn_deploy.bench.gpu.matrix import Cell, cells, engine_problem
from mgn_deploy.bench.gpu.turns import METHOD, Rivals
from mgn_deploy.bench.report import machine, sentence
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.config import ModelConfig
from mgn_deploy.cuda.device import this_gpu
from mgn_deploy.datasets import open_data
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.proof.prove import proof_pixels, prove_again
from mgn_deploy.train.weights import load_weights, weights_hash, write_untrained_weights

_log = logging.getLogger("mgn_deploy")

DRAWN_IDENTITIES = 16  # to calibrate on where no images are given: 128 crops


class Matrix:
    """One run. `save` gets the whole result after each row.

    Raises:
        UserError: no such weights or data.
    """

    def __init__(self, chosen: argparse.Namespace, scratch: Path, save: Callable[[dict[str, Any]], None]) -> None:
        self._deadline = time.monotonic() + chosen.budget
        self._longest = {True: 0.0, False: 0.0}  # seconds of a row so far, with its bundle to be exported first or not
        self._bundles: dict[tuple[str, bool, str | None], Bundle | Exception] = {}
        self._chosen, self._scratch, self._save = chosen, scratch, save
        self._weights: Path = chosen.weights or scratch / "weights"
        if not chosen.weights:
            write_untrained_weights(self._weights, ModelConfig())
        config = load_weights(self._weights).config
        self._data = open_data(chosen.data) if chosen.data else None
        self._proof_images = self._data.root / "query" if self._data else None
        self._crops = proof_pixels(self._proof_images, config.height, config.width).crops
        self._rivals = Rivals(self._weights, not chosen.no_compile, chosen.batches)
        self._problems = {engine: engine_problem(engine) for engine in chosen.engines}
        self._result: dict[str, Any] = {
            "bench": "matrix",
            "date": datetime.date.today().isoformat(),
            "device": machine(),
            "model": f"{config.backbone} MGN {config.height}x{config.width}, base width {config.base_width}",
            "weights": {"sha256": weights_hash(self._weights), "random": chosen.weights is None},
            "data": self._data
            and f"{self._data.name}: {len(self._data.query)} queries, {len(self._data.gallery)} gallery images",
            "method": METHOD,
            "rows": [],
        }

    def run(self) -> dict[str, Any]:
        waiting = cells(self._chosen.precisions, self._chosen.engines)
        for index, cell in enumerate(waiting):
            started, exports = time.monotonic(), cell.graph not in self._bundles
            row = self._row(cell, exports, len(waiting) - index)
            took = time.monotonic() - started
            self._longest[exports] = max(self._longest[exports], took)
            self._add({**cell._asdict(), **row, "seconds": round(took, 1)})
            self._free()
        return self._result

    def _row(self, cell: Cell, exports: bool, rows_left: int) -> dict[str, Any]:
        """What was measured, or why it was not."""
        problem = self._problems[cell.engine]
        if problem is None and cell.precision == "int8" and cell.placement is None:
            problem = "no INT8 graph is for it"
        if problem:
            return {"left_out": problem}
        if "stopped" in self._result:
            return {"not_begun": "the GPU was lost"}
        if time.monotonic() + self._longest[exports] > self._deadline:
            return {"not_begun": f"the budget of {self._chosen.budget:g} s was over"}
        try:
            return self._measure(self._bundle(cell), cell.engine, rows_left)
        except CannotRun as reason:
            return {"left_out": str(reason)}
        except Exception as error:  # an engine's or a compiler's: the other rows are worth having
            return {"failed": sentence(error)}

    def _bundle(self, cell: Cell) -> Bundle:
        """Of a graph, for all its engines; what its export failed of, each of them is told."""
        if cell.graph not in self._bundles:
            try:
                self._bundles[cell.graph] = self._export(*cell.graph)
            except Exception as error:
                self._bundles[cell.graph] = error
        found = self._bundles[cell.graph]
        if isinstance(found, Exception):
            raise found
        return found

    def _export(self, precision: str, fused_heads: bool, placement: str | None) -> Bundle:
        """Proven with every backend that runs here. Float plans are built while they are proven, and cached."""
        int8 = precision == "int8"
        allowed = 100.0 if self._chosen.weights is None else None
        options = ExportOptions(
            precision=precision,  # type: ignore[arg-type]
            engine=placement,
            compute_capabilities=(this_gpu().compute_capability,) if placement == "tensorrt-rtx" else (),
            calib=self._calibration() if int8 else None,
            data=self._data,
            max_drop=(allowed if self._chosen.max_drop is None else self._chosen.max_drop) if int8 else None,
            proof_images=self._proof_images,
        )
        bundle = export_bundle(self._weights, self._scratch / f"{precision}-{fused_heads}-{placement}", options)
        if fused_heads:
            prove_again(bundle.folder, proof_images=self._proof_images, data=self._data, fused_heads=True)
        return Bundle.open(bundle.folder)

    def _calibration(self) -> Path:
        drawn = self._scratch / "drawn"
        if not self._chosen.calib and not drawn.exists():
            draw_market1501(drawn, train_identities=DRAWN_IDENTITIES, test_identities=2)
        return self._chosen.calib or drawn / "bounding_box_train"

    def _measure(self, bundle: Bundle, engine: str, rows_left: int) -> dict[str, Any]:
        embedder = Embedder.open(bundle, engine, allow_unproven=True)
        manifest = bundle.manifest
        if engine not in manifest.proofs:
            raise UserError("it runs and has no proof: the log says why")
        proof = manifest.proofs[engine]
        row: dict[str, Any] = {
            "graph MB": round(manifest.files[GRAPH].size / 1e6, 1),
            "plan MB": plan_megabytes(bundle, embedder),
            "proof": proof.model_dump(mode="json", exclude={"passed", "misses"}),
        }
        row |= {"missed": proof.misses} if proof.misses else {}
        if manifest.quantisation:
            row["quantisation"] = manifest.quantisation.model_dump()
        share = time.monotonic() + (self._deadline - time.monotonic()) / rows_left
        row["speed"] = self._rivals.turns(
            embedder.backend, bundle, self._crops, rounds=self._chosen.rounds, until=share
        )
        return row

    def _add(self, row: dict[str, Any]) -> None:
        self._result["rows"].append(row)
        self._save(self._result)
        why = next((str(row[key]) for key in ("left_out", "failed", "not_begun") if key in row), "measured")
        _log.info(f"{row['precision']} {'fused heads ' if row['fused_heads'] else ''}{row['engine']}: {why}")

    def _free(self) -> None:
        """What a row took; and finds out whether the GPU can still be used in this process."""
        gc.collect()
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
        except RuntimeError as lost:
            self._result["stopped"] = sentence(lost)


def plan_megabytes(bundle: Bundle, embedder: Embedder) -> float | None:
    """Of the plan that runs, for one GPU; None where the engine keeps none."""
    backend = embedder.backend
    if isinstance(backend, TensorRtBackend):
        plan = plan_for(bundle, backend.name, backend.version, this_gpu(), backend.fused_heads)
        return round(len(plan) / 1e6, 1)
    return None
