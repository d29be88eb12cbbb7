"""Weights -> bundle: graph, reference weights, plans, manifest, and a proof for every backend that this machine has."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

import mgn_deploy
from mgn_deploy.backends.heads.cut import check_heads
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans, check_build
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import (
    GRAPH,
    MANIFEST,
    MANIFEST_HASH,
    REFERENCE,
    FileEntry,
    Manifest,
    Proof,
    write_manifest,
)
from mgn_deploy.bundle.signature import SIGNATURE, sign
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.precision.calibration_images import read_calibration_images
from mgn_deploy.export.precision.convert import graph_in_precision
from mgn_deploy.export.precision.half import float32_nodes
from mgn_deploy.export.proof.proof import Pixels
from mgn_deploy.export.proof.prove import drawn_pixels, embed_reference, proof_pixels, prove_backends
from mgn_deploy.export.proof.record import RECORD, record_bytes
from mgn_deploy.export.triton import write_model_repository
from mgn_deploy.files import atomic_folder, sha256_bytes
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.progress import Progress
from mgn_deploy.train.model import MGN
from mgn_deploy.train.weights import TENSORS, load_weights, weights_hash

FILES = (MANIFEST, MANIFEST_HASH, SIGNATURE, GRAPH, REFERENCE, RECORD, "*.plan", "*.layers.txt", "calibration.json")
TOOLS = ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")  # whose versions the manifest holds
_log = logging.getLogger("mgn_deploy")


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
    weights = Path(weights)
    model, pixels, calibration = _read_inputs(weights, options)
    with atomic_folder(Path(out), names=FILES) as folder:
        graph, manifest = _make_graph(weights, model, pixels, calibration, options)
        new = Bundle(folder, manifest)
        _write_file(new, GRAPH, graph.SerializeToString(deterministic=True))
        _write_file(new, REFERENCE, (weights / TENSORS).read_bytes())
        if settings:
            _build_plans(new, graph, settings, options, progress)
        write_manifest(folder, manifest)
        proofs = _prove(new, pixels, options)
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


def _prove(bundle: Bundle, pixels: Pixels, options: ExportOptions) -> dict[str, Proof]:
    """Record the reference's embeddings in the bundle, those of drawn people always, and prove the engines by them."""
    backend = ENGINES["torch"].load().open(bundle)
    recorded = [pixels] if pixels.drawn else [pixels, drawn_pixels(bundle.config.height, bundle.config.width)]
    embeddings = embed_reference(backend, *recorded)
    crops = np.concatenate([some.crops for some in recorded])
    _write_file(bundle, RECORD, record_bytes(crops, embeddings))
    reference = embeddings[: len(pixels.crops)]
    return prove_backends(bundle, pixels, reference, backend, options.data, fused_heads=options.fused_heads)


def _read_inputs(weights: Path, options: ExportOptions) -> tuple[MGN, Pixels, Pixels | None]:
    """Read the model, the pixels to prove on and those to calibrate on, before anything is traced: what is unreadable
    shall not cost minutes."""
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
    return model, pixels, calibration


def _make_graph(
    weights: Path, model: MGN, pixels: Pixels, calibration: Pixels | None, options: ExportOptions
) -> tuple[onnx.ModelProto, Manifest]:
    """The graph in its precision, and a manifest without files."""
    config = model.config
    _log.info(f"tracing {config.backbone} MGN {config.branches} at {config.height}x{config.width} to ONNX")
    graph, quantisation = graph_in_precision(model, options, pixels, calibration)
    kept = float32_nodes(graph)
    if kept:
        _log.warning(f"{len(kept)} operators stay in float32, they would overflow: {', '.join(kept)}")
    return graph, Manifest(
        model=config,
        flip=options.flip,
        precision=options.precision,
        preprocessing=PREPROCESSING,
        files={},
        source_weights_sha256=weights_hash(weights),
        tools={"mgn-deploy": mgn_deploy.__version__, **{package: version(package) for package in TOOLS}},
        quantisation=quantisation,
        float32_nodes=kept,
    )


def _build_plans(
    bundle: Bundle, graph: onnx.ModelProto, settings: BuildSettings, options: ExportOptions, progress: Progress | None
) -> None:
    """Put the plans and their layer tables into the bundle, and their entries into the manifest."""
    targets = ", ".join(options.compute_capabilities) or "this GPU"
    _log.info(f"building {settings.engine} plans of the {options.precision} graph for {targets}")
    plans = build_plans(graph, settings, options.compute_capabilities, use_cache=options.cache, progress=progress)
    for plan in plans:
        name = plan.file_name
        _write_file(bundle, name, plan.content)
        _write_file(bundle, f"{name.removesuffix('.plan')}.layers.txt", plan.layers.encode())
        bundle.manifest.engines.append(plan.entry(name))
        origin = "from the cache" if plan.cached else f"built in {plan.seconds:.1f} s"
        _log.info(f"{name}: {len(plan.content) / 1e6:.1f} MB, {origin}")


def _write_triton(bundle: Bundle, options: ExportOptions) -> None:
    assert options.triton is not None
    plan = next((entry for entry in bundle.manifest.engines if entry.engine == "tensorrt"), None)
    sizes = options.batch_sizes
    model = write_model_repository(bundle, options.triton, plan=plan, max_batch=sizes[2], preferred=sizes[1:])
    _log.info(f"{model}: {plan.file if plan else 'the graph, by ONNX Runtime,'} for Triton")
    if plan and plan.version_compatible:
        _log.warning("start Triton with --backend-config=tensorrt,version-compatible=true")


def _write_file(bundle: Bundle, name: str, content: bytes) -> None:
    """Put a file into the bundle and into its manifest."""
    (bundle.folder / name).write_bytes(content)
    bundle.manifest.files[name] = FileEntry(sha256=sha256_bytes(content), size=len(content))
