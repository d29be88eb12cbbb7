"""Bundles for the suite: exported where the exporter is installed, else of weights alone, which PyTorch can run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgn_deploy.bench.environment import sentence
from mgn_deploy.packages import import_problem

if TYPE_CHECKING:
    from mgn_deploy.bench.gpu.stages import Setup


def bundles(setup: Setup, precisions: tuple[str, ...]) -> Iterator[tuple[str, Path | str]]:
    """Precision and folder, or the reason why there is none. Weights are random unless the suite was given some."""
    problem = import_problem("torchvision", "train") or import_problem("safetensors", "train")
    if problem:
        yield from ((precision, problem) for precision in precisions)
        return
    from mgn_deploy.train.weights import write_untrained_weights

    weights = setup.weights or setup.scratch / "weights"
    if not weights.exists():
        write_untrained_weights(weights, setup.config())
    cannot_export = import_problem("onnx", "train") or import_problem("onnxscript", "train")
    for precision in precisions:
        folder = setup.scratch / f"bundle-{precision}"
        try:
            if not folder.exists() and cannot_export is None:
                _export(weights, folder, precision, setup)
            elif not folder.exists() and precision in ("fp16", "fp32", "bf16"):
                weights_bundle(weights, folder, precision)
            yield precision, folder if folder.exists() else str(cannot_export)
        except Exception as error:  # the other precisions are worth having
            yield precision, sentence(error)


def _export(weights: Path, folder: Path, precision: str, setup: Setup) -> None:
    from mgn_deploy.datasets.drawn import draw_market1501
    from mgn_deploy.export.exporter import export_bundle
    from mgn_deploy.export.options import ExportOptions

    given: dict[str, Any] = {"precision": precision}
    if precision == "int8":
        drawn = setup.scratch / "drawn"
        draw_market1501(drawn, train_identities=16, test_identities=2)
        engine = "tensorrt" if import_problem("tensorrt", "tensorrt") is None else "tensorrt-rtx"
        given |= {"engine": engine, "calib": drawn / "bounding_box_train", "max_drop": 100.0}
    export_bundle(weights, folder, ExportOptions(**given))


def weights_bundle(weights: Path, folder: Path, precision: str) -> None:
    """Write a bundle without a graph, for engines that run weights: where no exporter is installed."""
    from safetensors.torch import save

    from mgn_deploy.bundle.manifest import GRAPH, REFERENCE, FileEntry, Manifest, write_manifest
    from mgn_deploy.images.decode import PREPROCESSING
    from mgn_deploy.train.weights import load_weights, weights_hash

    model = load_weights(weights)
    folder.mkdir(parents=True)
    files = {}
    for name, content in ((GRAPH, b""), (REFERENCE, save(model.state_dict()))):
        (folder / name).write_bytes(content)
        files[name] = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    manifest = Manifest(
        model=model.config, flip=True, precision=precision, preprocessing=PREPROCESSING, files=files,
        source_weights_sha256=weights_hash(weights), tools={},
    )  # fmt: skip
    write_manifest(folder, manifest)
