"""Weights -> bundle: graph, reference weights, manifest, and a proof for every backend that this machine has."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mgn_deploy.export.graph import build_graph
from mgn_deploy.export.proof import proof_crops, prove, run_in_batches
from mgn_deploy.train.weights import TENSORS, load_weights, weights_hash

import mgn_deploy
from mgn_deploy.backends import ORDER, backend_module
from mgn_deploy.bundle import (
    GRAPH,
    MANIFEST,
    MANIFEST_HASH,
    REFERENCE,
    Bundle,
    FileEntry,
    Manifest,
    Proof,
    write_manifest,
)
from mgn_deploy.drawn import draw_people
from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_folder, sha256_file
from mgn_deploy.images import PREPROCESSING, read_crop

DRAWN_IMAGES = 96


def export_bundle(
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    flip: bool = True,
    reference: bool = True,
    proof_images: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Bundle:
    """Export a weights folder to a bundle and prove it with every backend that runs here.

    The bundle is written also where a proof misses its floor: it is marked so, and `require_proof` refuses it.

    Args:
        weights: a weights folder (`train/weights.py`).
        out: the bundle's folder; it appears whole, replacing an earlier bundle.
        flip: average the features of image and mirror in the graph (section 4.1).
        reference: put the PyTorch weights into the bundle, for the torch backend and `validate`.
        proof_images: folder of images to prove on; without it, on drawn people.
        say: called with each step's sentence.

    Raises:
        UserError: no weights, weights whose embeddings are not finite, no images, no CPU engine installed to prove with, or
            a place that is not writable.
    """
    weights = Path(weights)
    say(f"reading {weights}")
    model = load_weights(weights)
    config = model.config
    crops = _proof_pixels(proof_images, config.height, config.width)
    source = "drawn people" if proof_images is None else Path(os.path.abspath(proof_images)).name
    with atomic_folder(Path(out), names=(MANIFEST, MANIFEST_HASH, GRAPH, REFERENCE)) as folder:
        say(f"tracing {config.backbone} MGN {config.branches} at {config.height}x{config.width} to ONNX")
        content = build_graph(model, flip).SerializeToString(deterministic=True)
        (folder / GRAPH).write_bytes(content)
        files = {GRAPH: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))}
        shutil.copyfile(weights / TENSORS, folder / REFERENCE)
        files[REFERENCE] = FileEntry(sha256=sha256_file(folder / REFERENCE), size=(folder / REFERENCE).stat().st_size)
        manifest = Manifest(
            model=config,
            flip=flip,
            precision="fp32",
            preprocessing=PREPROCESSING,
            files=files,
            source_weights_sha256=weights_hash(weights),
            tools=_tool_versions(),
        )
        write_manifest(folder, manifest)
        proofs = _prove_all(Bundle(folder, manifest), crops, source, proof_images is None, say)
        if not reference:
            (folder / REFERENCE).unlink()
            files = {GRAPH: files[GRAPH]}
        write_manifest(folder, manifest.model_copy(update={"files": files, "proofs": proofs}))
    return Bundle.open(out)


def _proof_pixels(folder: str | os.PathLike[str] | None, height: int, width: int) -> np.ndarray:
    if folder is not None:
        return proof_crops(Path(folder), height, width)
    from PIL import Image

    return np.stack([read_crop(Image.fromarray(pixels), height, width) for pixels in draw_people(DRAWN_IMAGES)])


def _prove_all(
    bundle: Bundle, crops: np.ndarray, source: str, drawn: bool, say: Callable[[str], None]
) -> dict[str, Proof]:
    """A proof for each backend that runs here; the reference is PyTorch with the source weights, batch norms not folded."""
    say(f"embedding {len(crops)} images of {source} with the PyTorch reference")
    reference_backend = backend_module("torch").open_engine(bundle)
    reference = run_in_batches(reference_backend, crops)
    if not np.isfinite(reference).all():
        raise UserError("PyTorch's own embeddings with these weights are not finite: train them anew")
    proofs = {}
    for name in ORDER:
        module = backend_module(name)
        reason = module.missing()
        if reason:
            say(f"no proof for {name}: {reason}")
            continue
        say(f"proving {name} on them")
        backend = reference_backend if name == "torch" else module.open_engine(bundle)
        proofs[name] = prove(backend, crops, reference, bundle.manifest.precision, image_source=source, drawn=drawn)
    if list(proofs) == ["torch"]:
        raise UserError("no engine is installed to prove the graph with: pip install 'mgn-deploy[cpu]'")
    return proofs


def _tool_versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")
    return {"mgn-deploy": mgn_deploy.__version__, **{package: version(package) for package in packages}}
