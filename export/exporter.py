"""Weights -> bundle: graph, reference weights, plans, manifest, and a proof for every backend that this machine has."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

import mgn_deploy
from mgn_deploy.backends.heads.cut import check_heads
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.builder import BuildSettings, Plan, build_plans, check_build
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import (
    GRAPH,
    MANIFEST,
    MANIFEST_HASH,
    REFERENCE,
    FileEntry,
    Manifest,
    Proof,
    Quantisation,
    write_manifest,
)
from mgn_deploy.bundle.signature import SIGNATURE, sign
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.precision.calibration_images import CalibrationImages, read_calibration_images
from mgn_deploy.export.precision.convert import to_half_precision, to_int8
from mgn_deploy.export.precision.half import float32_nodes
from mgn_deploy.export.proof.prove import ProofPixels, drawn_pixels, embed_reference, proof_pixels, prove_backends
from mgn_deploy.export.proof.record import RECORD, record_bytes
from mgn_deploy.export.triton import write_model_repository
from mgn_deploy.files import atomic_folder, sha256_file
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.progress import Progress
from mgn_deploy.train.model import MGN
from mgn_deploy.train.weights import TENSORS, load_weights, weights_hash

BUDGET_IMAGES = 128  # of the calibration images, where there are no real ones to prove on
FILES = (MANIFEST, MANIFEST_HASH, SIGNATURE, GRAPH, REFERENCE, RECORD, "*.plan", "*.layers.txt", "calibration.json")
_log = logging.getLogger("mgn_deploy")


class _Inputs(NamedTuple):
    """What an export reads: the model, the pixels to prove on, and the calibration images where they are used."""

    weights: Path
    model: MGN
    pixels: ProofPixels
    calibration: CalibrationImages | None


def export_bundle(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Export a weights folder to a bundle and prove it with every backend that runs here.

    The bundle is written also where a proof misses its threshold: it is marked so, and `require_proof` refuses it.

    Args:
        weights: a weights folder (`train/weights.py`).
        out: the bundle's folder; it appears whole, replacing an earlier bundle.
        options: what to export; None: a float32 graph.
        progress: called while plans are built.

    Raises:
        CannotRun: INT8 without the engine that calibrates it, plans without their builder.
        UserError: no weights, weights whose embeddings are not finite, no images, an INT8 budget that cannot be kept,
            no engine installed to prove with, a graph that TensorRT refuses, or a folder that cannot be written.
    """
    options = options or ExportOptions()
    settings = options.build_settings()
    if settings:
        check_build(settings, options.compute_capabilities)
    inputs = _read_inputs(Path(weights), options)
    with atomic_folder(Path(out), names=FILES) as folder:
        graph, manifest = _make_graph(inputs, options)
        _write_file(folder, GRAPH, graph.SerializeToString(deterministic=True), manifest.files)
        shutil.copyfile(inputs.weights / TENSORS, folder / REFERENCE)
        manifest.files[REFERENCE] = _entry_of(folder / REFERENCE)
        if settings:
            _build_plans(folder, graph, settings, options, manifest, progress)
        write_manifest(folder, manifest)
        proofs = _prove(Bundle(folder, manifest), inputs.pixels, options)
        if not options.reference:
            (folder / REFERENCE).unlink()
            del manifest.files[REFERENCE]
        write_manifest(folder, manifest.model_copy(update={"proofs": proofs}))
        if options.sign is not None:
            sign(folder, options.sign)
    bundle = Bundle.open(out, verify_key="" if options.sign is None else None)
    if options.triton is not None:
        _write_triton(bundle, options)
    return bundle


def _prove(bundle: Bundle, pixels: ProofPixels, options: ExportOptions) -> dict[str, Proof]:
    """Record the reference's embeddings in the bundle, those of drawn people always, and prove the engines by them."""
    backend = ENGINES["torch"].load().open(bundle)
    recorded = [pixels] if pixels.drawn else [pixels, drawn_pixels(bundle.config.height, bundle.config.width)]
    embeddings = embed_reference(backend, *recorded)
    crops = np.concatenate([some.crops for some in recorded])
    _write_file(bundle.folder, RECORD, record_bytes(crops, embeddings), bundle.manifest.files)
    reference = embeddings[: len(pixels.crops)]
    return prove_backends(bundle, pixels, reference, backend, options.data, fused_heads=options.fused_heads)


def _read_inputs(weights: Path, options: ExportOptions) -> _Inputs:
    """Read everything before anything is traced: what is unreadable shall not cost minutes."""
    _log.info(f"reading {weights}")
    model = load_weights(weights)
    config = model.config
    if options.fused_heads:
        check_heads(config, options.flip, options.batch_sizes[2])
    pixels = proof_pixels(options.proof_images, config.height, config.width)
    calibration = None
    if options.calib is not None:
        calibration = read_calibration_images(
            options.calib, config.height, config.width, pixels.crops, count=options.calib_count
        )
        for warning in calibration.warnings:
            _log.warning(warning)
    return _Inputs(weights, model, pixels, calibration)


def _make_graph(inputs: _Inputs, options: ExportOptions) -> tuple[onnx.ModelProto, Manifest]:
    """The graph in its precision, and a manifest without files."""
    config = inputs.model.config
    _log.info(f"tracing {config.backbone} MGN {config.branches} at {config.height}x{config.width} to ONNX")
    graph = build_graph(inputs.model, options.flip)
    quantisation: Quantisation | None = None
    if options.precision == "int8":
        graph, quantisation = _to_int8(graph, inputs, options)
    elif options.precision != "fp32":
        crops = inputs.pixels.crops if inputs.calibration is None else inputs.calibration.crops
        graph = to_half_precision(graph, options.precision, crops)
    kept = float32_nodes(graph)
    if kept:
        _log.warning(f"{len(kept)} operators stay in float32, they would overflow: {', '.join(kept)}")
    return graph, Manifest(
        model=config,
        flip=options.flip,
        precision=options.precision,
        preprocessing=PREPROCESSING,
        files={},
        source_weights_sha256=weights_hash(inputs.weights),
        tools=_tool_versions(),
        quantisation=quantisation,
        float32_nodes=kept,
    )


def _to_int8(graph: onnx.ModelProto, inputs: _Inputs, options: ExportOptions) -> tuple[onnx.ModelProto, Quantisation]:
    assert inputs.calibration is not None  # ExportOptions refuses INT8 without
    plain = build_graph(inputs.model, flip=False) if options.flip else graph
    budget_crops = inputs.calibration.crops[:BUDGET_IMAGES] if inputs.pixels.drawn else inputs.pixels.crops
    if options.data is None:
        _log.info(
            f"INT8's budget is about the neighbours of {len(budget_crops)} images: --data holds it on labelled people"
        )
    return to_int8(
        graph,
        plain,
        inputs.model.config,
        options.int8_engine,
        inputs.calibration,
        budget_crops,
        options.data,
        options.int8_budget,
    )


def _build_plans(
    folder: Path,
    graph: onnx.ModelProto,
    settings: BuildSettings,
    options: ExportOptions,
    manifest: Manifest,
    progress: Progress | None,
) -> None:
    """Put the plans and their layer tables into the bundle, and their entries into the manifest."""
    targets = ", ".join(options.compute_capabilities) or "this GPU"
    _log.info(f"building {settings.engine} plans of the {options.precision} graph for {targets}")
    plans = build_plans(graph, settings, options.compute_capabilities, use_cache=options.cache, progress=progress)
    for plan in plans:
        name = plan.file_name
        _write_file(folder, name, plan.content, manifest.files)
        _write_file(folder, f"{name.removesuffix('.plan')}.layers.txt", plan.layers.encode(), manifest.files)
        manifest.engines.append(plan.entry(name))
        _log.info(f"{name}: {len(plan.content) / 1e6:.1f} MB, {_origin(plan)}")


def _origin(plan: Plan) -> str:
    return "from the cache" if plan.cached else f"built in {plan.seconds:.1f} s"


def _write_triton(bundle: Bundle, options: ExportOptions) -> None:
    assert options.triton is not None
    plan = next((entry for entry in bundle.manifest.engines if entry.engine == "tensorrt"), None)
    sizes = options.batch_sizes
    model = write_model_repository(bundle, options.triton, plan=plan, max_batch=sizes[2], preferred=sizes[1:])
    _log.info(f"{model}: {plan.file if plan else 'the graph, by ONNX Runtime,'} for Triton")
    if plan and plan.version_compatible:
        _log.warning("start Triton with --backend-config=tensorrt,version-compatible=true")


def _write_file(folder: Path, name: str, content: bytes, files: dict[str, FileEntry]) -> None:
    """Put a file into the bundle and into `files`."""
    (folder / name).write_bytes(content)
    files[name] = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _entry_of(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_file(path), size=path.stat().st_size)


def _tool_versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")
    return {"mgn-deploy": mgn_deploy.__version__, **{package: version(package) for package in packages}}
