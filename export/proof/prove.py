"""Every backend that runs here, proven on one bundle: at export, and again where the bundle has been copied to."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import ENGINES, Engine
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import Manifest, Proof, Quantisation, Ranking, write_manifest
from mgn_deploy.bundle.signature import SIGNATURE, read_private_key, sign
from mgn_deploy.datasets import Dataset
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, GateFailed, UserError
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.export.proof.proof import Pixels, proof_crops, prove, with_ranking
from mgn_deploy.export.proof.record import recorded_embeddings
from mgn_deploy.files import printable
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.ranking import RankingMetrics
from mgn_deploy.retrieval.validate import validate

_log = logging.getLogger("mgn_deploy")

DRAWN_IMAGES = 96


def prove_again(
    folder: str | os.PathLike[str],
    *,
    proof_images: str | os.PathLike[str] | None = None,
    data: Dataset | None = None,
    sign_key: str | os.PathLike[str] | None = None,
) -> dict[str, Proof]:
    """Prove a bundle with every backend that runs here, as on the GPU machine that it was copied to; its id stays.

    Engines are compared with the reference's embeddings that the export recorded (`record.py`), which needs no PyTorch;
    of images that it did not record, with what PyTorch makes of them here. Proofs of backends that do not run here stay
    in the bundle as they are; those made here are returned. Without `data` they keep the ranking that was measured
    before, and what it misses.

    Args:
        folder: a bundle.
        proof_images: folder of images to prove on; without it, on drawn people.
        data: labelled queries and gallery: each proof also has their rank-1 and mAP.
        sign_key: PEM file of an Ed25519 private key, to sign the new proofs; without it an earlier signature goes.

    Raises:
        CannotRun: images that were not recorded, or `data`, without PyTorch or the bundle's reference weights.
        UserError: no bundle, no images, or no engine to prove.
    """
    bundle = Bundle.open(folder)
    if sign_key is not None:
        read_private_key(sign_key)
    pixels = proof_pixels(proof_images, bundle.config.height, bundle.config.width)
    reference, reference_backend = _reference(bundle, pixels, with_backend=data is not None)
    made = prove_backends(bundle, pixels, reference, reference_backend, data)
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
    if sign_key is not None:
        sign(bundle.folder, sign_key)
    elif (bundle.folder / SIGNATURE).exists():
        (bundle.folder / SIGNATURE).unlink()
        _log.warning(f"{bundle.folder} has new proofs, and is no longer signed: --sign KEY signs it again")
    return made


def require_passed(folder: str | os.PathLike[str], proofs: Mapping[str, Proof]) -> None:
    """Raise GateFailed, with what each proof misses, unless all of a bundle's proofs have passed."""
    failed = [f"{name} ({', '.join(proof.misses)})" for name, proof in proofs.items() if not proof.passed]
    if failed:
        raise GateFailed(f"{os.fspath(folder)} is not proven for {'; '.join(failed)}")


def proof_pixels(folder: str | os.PathLike[str] | None, height: int, width: int) -> Pixels:
    """Of a folder, or of drawn people.

    Raises:
        UserError: no such folder, or too few readable images.
    """
    if folder is not None:
        return Pixels(proof_crops(Path(folder), height, width), printable(os.path.basename(os.path.abspath(folder))))
    _log.info("the proof is on drawn people: --proof-images DIR proves on yours")
    return drawn_pixels(height, width)


def drawn_pixels(height: int, width: int) -> Pixels:
    """Drawn people, the same pixels everywhere."""
    from PIL import Image

    people = [read_crop(Image.fromarray(pixels), height, width) for pixels in draw_people(DRAWN_IMAGES)]
    return Pixels(np.stack(people), "drawn people", drawn=True)


def _reference(bundle: Bundle, pixels: Pixels, *, with_backend: bool) -> tuple[np.ndarray, Backend | None]:
    """The reference's embeddings of the crops, recorded or made here, and PyTorch opened where it is here.

    `with_backend`: it is needed in any case.
    """
    torch = ENGINES["torch"].load()
    missing = torch.missing()
    try:
        backend = None if missing else torch.open(bundle)
    except CannotRun as error:
        missing, backend = str(error), None
    if with_backend and backend is None:
        raise CannotRun(f"--data ranks people with the reference too, which cannot run here: {missing}")
    try:
        return recorded_embeddings(bundle, pixels.crops, pixels.source), backend
    except CannotRun as error:
        if backend is None:
            raise CannotRun(f"{error}; others need the reference, which cannot run here: {missing}") from None
        _log.info(f"{error}; they are embedded here")
        return embed_reference(backend, pixels), backend


def embed_reference(backend: Backend, *pixels: Pixels) -> np.ndarray:
    """The reference's embeddings `[n, dim]` of crops; it is PyTorch with the source weights, batch norms not folded.

    Raises:
        UserError: they are not finite.
    """
    for some in pixels:
        _log.info(f"embedding {len(some.crops)} images of {some.source} with the PyTorch reference")
    reference = np.concatenate([run_in_batches(backend, some.crops) for some in pixels])
    if not np.isfinite(reference).all():
        raise UserError("PyTorch's own embeddings with these weights are not finite: train them again")
    return reference


def prove_backends(
    bundle: Bundle,
    pixels: Pixels,
    reference: np.ndarray,
    reference_backend: Backend | None,
    data: Dataset | None,
    *,
    fused_heads: bool = False,
) -> dict[str, Proof]:
    """Make a proof for each backend that runs here.

    Args:
        bundle: it is not changed.
        pixels: crops to prove on.
        reference: the reference's embeddings of them.
        reference_backend: PyTorch with the source weights; None where it is not here.
        data: labelled people to rank with each backend and with the reference.
        fused_heads: engines on a GPU run the heads as the stripe-pool-reduce kernel.

    Raises:
        UserError: no engine besides the reference runs the bundle here.
    """
    ranked = None
    if data and reference_backend:
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
            if row.name == "torch" and reference_backend:
                backend = reference_backend
            else:
                backend = row.load().open(bundle, fused_heads=fused_heads and row.fused_heads)
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
    pixels: Pixels,
    reference: np.ndarray,
    data: Dataset | None,
    ranked: RankingMetrics | None,
) -> Proof:
    """One backend's proof, with its ranking of `data` beside the reference's, `ranked`."""
    manifest = bundle.manifest
    proof = prove(backend, pixels, reference, manifest.precision)
    if not data or not ranked:
        return proof
    is_reference = backend.name == "torch"
    measured = ranked if is_reference else validate(data, Embedder(backend, bundle.config), None).measured
    ranking = Ranking(
        data=data.name,
        queries=len(data.query),
        gallery=len(data.gallery),
        rank1=measured.rank[1],
        mAP=measured.mAP,
        reference_rank1=ranked.rank[1],
        reference_mAP=ranked.mAP,
    )
    return with_ranking(proof, ranking, manifest.precision, allowed_map(manifest.quantisation))


def allowed_map(quantisation: Quantisation | None) -> float:
    """mAP, as a fraction, that the user gave INT8 to lose; a budget of top-10 agreement says nothing about it."""
    return quantisation.max_drop / 100 if quantisation and quantisation.drop_of == "mAP" else 0.0
