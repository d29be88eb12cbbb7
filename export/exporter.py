"""Weights -> bundle: graph, reference weights, manifest, and a proof for every backend that this machine has."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import onnx

import mgn_deploy
from mgn_deploy.backends.heads.cut import check_heads, cut_heads
from mgn_deploy.backends.tensorrt.builder import BuildSettings, Plan, build_plans, check_build
from mgn_deploy.bench.layer_table import summary
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.engine_entry import EngineEntry
from mgn_deploy.bundle.manifest import (
    GRAPH,
    HEADS,
    MANIFEST,
    MANIFEST_HASH,
    REFERENCE,
    FileEntry,
    Heads,
    Manifest,
    Precision,
    write_manifest,
)
from mgn_deploy.datasets import Dataset
from mgn_deploy.errors import UserError
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.precision.calibration_images import COUNT, read_calibration_images
from mgn_deploy.export.precision.convert import ENGINES, to_half_precision, to_int8
from mgn_deploy.export.precision.half import float32_nodes
from mgn_deploy.export.proof.prove import proof_pixels, prove_backends
from mgn_deploy.files import atomic_folder, sha256_file
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.progress import Progress
from mgn_deploy.train.weights import TENSORS, load_weights, weights_hash

_log = logging.getLogger("mgn_deploy")

MAX_DROP = 0.5  # points
BUDGET_IMAGES = 128  # of the calibration images, where there are no real ones to prove on
FILES = (MANIFEST, MANIFEST_HASH, GRAPH, HEADS, REFERENCE, "*.plan", "*.layers.json")


def export_bundle(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    heads: Heads = "plain",
    engine: str | None = None,
    build: BuildSettings | None = None,
    compute_capabilities: Sequence[str] = (),
    use_cache: bool = True,
    build_progress: Progress | None = None,
    calib: str | os.PathLike[str] | None = None,
    calib_count: int = COUNT,
    data: Dataset | None = None,
    max_drop: float = MAX_DROP,
    flip: bool = True,
    reference: bool = True,
    proof_images: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Export a weights folder to a bundle and prove it with every backend that runs here.

    The bundle is written also where a proof misses its floor: it is marked so, and `require_proof` refuses it.

    Args:
        weights: a weights folder (`train/weights.py`).
        out: the bundle's folder; it appears whole, replacing an earlier bundle.
        precision: of the network; pixels, the heads' sums and the L2 norm are float32 in all.
        heads: "fused" ends the graph with the maps; backends on a GPU go on by the stripe-pool-reduce kernel, those on a CPU by
            its reference.
        engine: "tensorrt" and "tensorrt-rtx" also build plans. An INT8 graph is placed for one of them (`export/precision.py`, ENGINES; without
            a name OpenVINO); the other precisions' graphs are the same for every engine.
        build: of the plans: batches, workspace, compatibility.
        compute_capabilities: a plan for each, ahead of time (TensorRT-RTX).
        use_cache: take plans from the cache and put them there.
        build_progress: called as (phase, step, steps) while a plan is built.
        calib: folder of images to calibrate INT8 on; FP16's ranges are looked at on them, too.
        calib_count: images to take of them.
        data: labelled queries and gallery: each proof also has their rank-1 and mAP, and INT8's budget is about their mAP.
        max_drop: points of mAP, without `data` of top-10 agreement, that INT8 may lose. The agreement is looked at on the
            proof images, without these on images of `calib`.
        flip: average the features of image and mirror in the graph (section 4.1).
        reference: put the PyTorch weights into the bundle, for the torch backend and `validate`.
        proof_images: folder of images to prove on; without it, on drawn people.

    Raises:
        CannotRun: INT8 without the engine that calibrates it.
        UserError: INT8 without images to calibrate on or with a budget that cannot be kept; no weights, weights whose
            embeddings are not finite, no images, no engine installed to prove with, a graph that TensorRT refuses, or a
            place that is not writable.
    """
    if precision == "int8" and calib is None:
        raise UserError("INT8 needs images to calibrate on: --calib DIR, some 500 like those that it will see")
    if engine is not None and engine not in ENGINES:
        raise UserError(f"no engine {engine!r} to quantise for: choose {', '.join(ENGINES)}")
    if engine in ("tensorrt", "tensorrt-rtx"):
        build = build or BuildSettings(engine.replace("-", "_"))  # type: ignore[arg-type]
        check_build(build, compute_capabilities)
    else:
        build = None  # the other engines have no plans
    weights = Path(weights)
    _log.info(f"reading {weights}")
    model = load_weights(weights)
    config = model.config
    if heads == "fused":
        check_heads(config, flip, build.batch[2] if build else 1)
    pixels = proof_pixels(proof_images, config.height, config.width)
    images = None
    if calib is not None and precision in ("int8", "fp16"):
        images = read_calibration_images(calib, config.height, config.width, pixels.crops, count=calib_count)
        for warning in images.warnings:
            _log.info(warning)
    with atomic_folder(Path(out), names=FILES) as folder:
        _log.info(f"tracing {config.backbone} MGN {config.branches} at {config.height}x{config.width} to ONNX")
        graph = build_graph(model, flip)
        manifest = Manifest(
            model=config,
            flip=flip,
            precision=precision,
            preprocessing=PREPROCESSING,
            files={},
            source_weights_sha256=weights_hash(weights),
            tools=_tool_versions(),
        )
        if precision == "int8":
            assert images is not None
            plain = build_graph(model, flip=False) if flip else graph
            looked_at = images.crops[:BUDGET_IMAGES] if pixels.drawn else pixels.crops
            if data is None:
                _log.info(
                    f"INT8's budget is about the neighbours of {len(looked_at)} images: --data holds it on labelled people"
                )
            graph, quantisation = to_int8(
                graph, plain, manifest, engine or "openvino", images, looked_at, data, max_drop
            )
            manifest = manifest.model_copy(update={"quantisation": quantisation})
        elif precision != "fp32":
            graph = to_half_precision(graph, precision, pixels.crops if images is None else images.crops)
        kept = float32_nodes(graph)
        if kept:
            _log.info(f"{len(kept)} operators stay in float32, they would overflow: {', '.join(kept)}")
            manifest = manifest.model_copy(update={"float32_nodes": kept})
        files: dict[str, FileEntry] = {}
        if heads == "fused":
            graph, fused = cut_heads(graph, config, flip)
            _write_file(folder, HEADS, fused.to_bytes(), files)
            manifest = manifest.model_copy(update={"heads": heads})
        _write_file(folder, GRAPH, graph.SerializeToString(deterministic=True), files)
        shutil.copyfile(weights / TENSORS, folder / REFERENCE)
        files[REFERENCE] = FileEntry(sha256=sha256_file(folder / REFERENCE), size=(folder / REFERENCE).stat().st_size)
        if build:
            _log.info(
                f"building {engine} plans of the {precision} graph for {', '.join(compute_capabilities) or 'this GPU'}"
            )
            plans = build_plans(graph, build, compute_capabilities, use_cache=use_cache, progress=build_progress)
            manifest = manifest.model_copy(
                update={"engines": [_write_plan(plan, graph, folder, files) for plan in plans]}
            )
        manifest = manifest.model_copy(update={"files": files})
        write_manifest(folder, manifest)
        proofs = prove_backends(Bundle(folder, manifest), pixels, data)
        if not reference:
            (folder / REFERENCE).unlink()
            del files[REFERENCE]
        write_manifest(folder, manifest.model_copy(update={"files": files, "proofs": proofs}))
    return Bundle.open(out)


def _write_file(folder: Path, name: str, content: bytes, files: dict[str, FileEntry]) -> None:
    """Puts a file into the bundle and into `files`."""
    (folder / name).write_bytes(content)
    files[name] = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _write_plan(plan: Plan, graph: onnx.ModelProto, folder: Path, files: dict[str, FileEntry]) -> EngineEntry:
    """Puts a plan and its layer table into the bundle and into `files`."""
    table = plan.file_name.removesuffix(".plan") + ".layers.json"
    _write_file(folder, plan.file_name, plan.content, files)
    _write_file(folder, table, json.dumps(plan.layers, indent=1).encode(), files)
    facts = summary(plan.layers, graph)
    _log.info(
        f"{plan.file_name}: {len(plan.content) / 1e6:.1f} MB, {'from the cache' if plan.cached else f'{plan.seconds:.1f} s'}, "
        + ", ".join(f"{name} {value}" for name, value in facts.items())
    )
    return plan.entry(plan.file_name)


def _tool_versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")
    return {"mgn-deploy": mgn_deploy.__version__, **{package: version(package) for package in packages}}
