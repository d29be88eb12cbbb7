"""Every backend that runs here, proven on one bundle: at export, and again where the bundle has been copied to."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import ENGINES, Engine
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import Manifest, Proof, Quantisation, write_manifest
from mgn_deploy.datasets import Dataset
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.export.proof.proof import add_ranking, proof_crops, prove, with_ranking
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.ranking import RankingMetrics
from mgn_deploy.retrieval.validate import validate

_log = logging.getLogger("mgn_deploy")

DRAWN_IMAGES = 96


class ProofPixels(NamedTuple):
    """Crops to prove on, uint8 `[n, height, width, 3]`, what the proof calls them, and whether they were drawn."""

    crops: np.ndarray
    source: str
    drawn: bool


def prove_again(
    folder: str | os.PathLike[str],
    *,
    proof_images: str | os.PathLike[str] | None = None,
    data: Dataset | None = None,
    fused_heads: bool = False,
) -> dict[str, Proof]:
    """Prove a bundle with every backend that runs here, as on the GPU machine that it was copied to; its id stays.

    Proofs of backends that do not run here stay in the bundle as they are; those made here are returned. Without `data`
    they keep the ranking that was measured before, and what it misses.

    Args:
        folder: a bundle with its reference weights.
        proof_images: folder of images to prove on; without it, on drawn people.
        data: labelled queries and gallery: each proof also has their rank-1 and mAP.
        fused_heads: engines on a GPU run the heads as the stripe-pool-reduce kernel.

    Raises:
        CannotRun: PyTorch is not installed, or the bundle was exported with --no-reference.
        UserError: no bundle, no images, or no engine to prove.
    """
    bundle = Bundle.open(folder)
    pixels = proof_pixels(proof_images, bundle.config.height, bundle.config.width)
    made = prove_backends(bundle, pixels, data, fused_heads=fused_heads)
    for name, proof in made.items():
        before = bundle.manifest.proofs.get(name)
        if before and before.ranking and not proof.ranking:
            _log.info(
                f"{name}: the ranking of {before.ranking.data} stays as it was measured; --data measures it again"
            )
            allowed = allowed_map(bundle.manifest.quantisation)
            made[name] = with_ranking(proof, before.ranking, bundle.manifest.precision, allowed)
    proofs = {**bundle.manifest.proofs, **made}
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"proofs": proofs}))
    return made


def require_passed(folder: str | os.PathLike[str], proofs: Mapping[str, Proof]) -> None:
    """Raise GateFailed, with what each proof misses, unless all of a bundle's proofs have passed."""
    failed = [f"{name} ({', '.join(proof.misses)})" for name, proof in proofs.items() if not proof.passed]
    if failed:
        raise GateFailed(f"{os.fspath(folder)} is not proven for {'; '.join(failed)}")


def proof_pixels(folder: str | os.PathLike[str] | None, height: int, width: int) -> ProofPixels:
    """Of a folder, or of drawn people.

    Raises:
        UserError: no such folder, or too few readable images.
    """
    if folder is not None:
        return ProofPixels(proof_crops(Path(folder), height, width), Path(os.path.abspath(folder)).name, False)
    from PIL import Image

    _log.info("the proof is on drawn people: --proof-images DIR proves on yours")
    people = [read_crop(Image.fromarray(pixels), height, width) for pixels in draw_people(DRAWN_IMAGES)]
    return ProofPixels(np.stack(people), "drawn people", True)


def prove_backends(
    bundle: Bundle, pixels: ProofPixels, data: Dataset | None, *, fused_heads: bool = False
) -> dict[str, Proof]:
    """Make a proof for each backend that runs here; the reference is PyTorch with the source weights, batch norms not
    folded.

    Raises:
        UserError: the reference's embeddings are not finite, or no engine besides it runs the bundle here.
    """
    _log.info(f"embedding {len(pixels.crops)} images of {pixels.source} with the PyTorch reference")
    reference_backend = ENGINES["torch"].load().open(bundle)
    reference = run_in_batches(reference_backend, pixels.crops)
    if not np.isfinite(reference).all():
        raise UserError("PyTorch's own embeddings with these weights are not finite: train them again")
    ranked = None
    if data:
        ranked = validate(data, Embedder(reference_backend, bundle.config), None).measured
    proofs: dict[str, Proof] = {}
    failed: list[str] = []
    for row in _candidates(bundle.manifest):
        reason = row.load().missing()
        if reason:
            _log.info(f"no proof for {row.name}: {reason}")
            continue
        _log.info(f"proving {row.name} on them")
        try:
            backend = (
                reference_backend
                if row.name == "torch"
                else row.load().open(bundle, fused_heads=fused_heads and row.fused_heads)
            )
            proofs[row.name] = _prove_one(bundle, backend, pixels, reference, data, ranked)
        except UserError as error:  # as where a GPU's memory is full: the other backends' proofs are worth having
            _log.warning(f"no proof for {row.name}: {error}")
            failed.append(f"{row.name}: {error}")
    if not set(proofs) - {"torch"}:
        if failed:
            raise UserError(f"no engine that is installed here runs {bundle.folder}. " + " | ".join(failed))
        raise UserError("no engine is installed to prove the graph with: pip install 'mgn-deploy[cpu]'")
    return proofs


def _candidates(manifest: Manifest) -> list[Engine]:
    """The engines that a bundle is for. PyTorch runs the float32 weights, which a bundle of less precision is not."""
    rows = list(ENGINES.values())
    if manifest.quantisation is not None:
        return [row for row in rows if manifest.quantisation.engine in row.int8_for]
    return [row for row in rows if row.name != "torch" or manifest.precision == "fp32"]


def _prove_one(
    bundle: Bundle,
    backend: Backend,
    pixels: ProofPixels,
    reference: np.ndarray,
    data: Dataset | None,
    ranked: RankingMetrics | None,
) -> Proof:
    """One backend's proof, with its ranking of `data` beside the reference's, `ranked`."""
    manifest = bundle.manifest
    proof = prove(backend, pixels.crops, reference, manifest.precision, image_source=pixels.source, drawn=pixels.drawn)
    if not data or not ranked:
        return proof
    is_reference = backend.name == "torch"
    measured = ranked if is_reference else validate(data, Embedder(backend, bundle.config), None).measured
    return add_ranking(proof, measured, ranked, data, manifest.precision, allowed_map(manifest.quantisation))


def allowed_map(quantisation: Quantisation | None) -> float:
    """mAP, as a fraction, that the user gave INT8 to lose; a budget of top-10 agreement says nothing about it."""
    return quantisation.max_drop / 100 if quantisation and quantisation.drop_of == "mAP" else 0.0
