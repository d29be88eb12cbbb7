"""The proof: a backend's embeddings beside the PyTorch reference's, on the same pixels."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.bundle.manifest import Proof, Ranking
from mgn_deploy.choices import Precision
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.export.proof.agreement import BATCH, cosines, run_in_batches, top_agreement
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import list_images

_log = logging.getLogger("mgn_deploy")

MOST_IMAGES = 256
FEWEST_IMAGES = 12  # an image and its ten neighbours, and one that is none
NEIGHBOURS = 10

# Floors by precision: (worst cosine, top-10 agreement, largest change of a coordinate with the batch). INT8's ranking
# is held by its accuracy budget (`export/int8.py`); its floor here catches an engine that computes something else.
FLOORS: dict[Precision, tuple[float, float, float]] = {
    "fp32": (0.99999, 0.995, 1e-4),
    "fp16": (0.9999, 0.98, 2e-3),
    "bf16": (0.999, 0.95, 1e-2),
    "int8": (0.95, 0.80, 1e-2),
}
# The share of the reference's mAP and rank-1 that has to be kept where labelled people are ranked.
KEPT: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.999, "int8": 0.99}
# Batches in which images are looked for among other neighbours, at other places; an odd one among them. An engine with
# a shape profile is also tried at its fewest, best and most.
BATCHES = (1, 3, BATCH, 13)
DRIFT_IMAGES = 13


class Pixels(NamedTuple):
    """Crops, uint8 `[n, height, width, 3]`, what the manifest calls them, and whether they were drawn."""

    crops: np.ndarray
    source: str
    drawn: bool = False


def proof_crops(folder: Path, height: int, width: int) -> np.ndarray:
    """At most 256 crops of a folder, evenly spread over its sorted names: uint8 `[n, height, width, 3]`.

    Raises:
        UserError: no such folder, or fewer than 12 readable images.
    """
    files = [file.path for file in list_images(folder) if file.path]
    step = max(1, -(-len(files) // MOST_IMAGES))
    crops, unreadable = [], 0
    for path in files[::step]:
        try:
            crops.append(read_crop(path, height, width))
        except UnreadableImage:
            unreadable += 1  # a proof needs pixels, not every file
    if len(crops) < FEWEST_IMAGES:
        raise UserError(f"{folder} has {len(crops)} readable images: a proof needs at least {FEWEST_IMAGES}")
    if unreadable:
        _log.warning(f"{unreadable} of the {unreadable + len(crops)} images of {folder} to prove on cannot be read")
    return np.stack(crops)


def prove(backend: Backend, pixels: Pixels, reference: np.ndarray, precision: Precision) -> Proof:
    """Compare a backend with the reference's embeddings `[n, dim]` of the same pixels."""
    crops = pixels.crops
    embeddings = run_in_batches(backend, crops)
    drift = batch_drift(backend, crops, embeddings, sorted({*BATCHES, *(backend.batch_limits or ())}))
    finite = bool(np.isfinite(embeddings).all() and np.isfinite(drift))
    cosine = cosines(embeddings, reference) if finite else np.zeros(len(reference))
    agreement = top_agreement(embeddings, reference, NEIGHBOURS) if finite else 0.0
    similarity = reference.astype(np.float64) @ reference.T.astype(np.float64)
    different = similarity[~np.eye(len(reference), dtype=bool)]

    least_cosine, least_agreement, most_drift = FLOORS[precision]
    misses = [] if finite else ["embeddings are not finite"]
    if cosine.min() < least_cosine:
        misses.append(f"worst cosine {cosine.min():.6f} is below {least_cosine}")
    if agreement < least_agreement:
        misses.append(f"top-10 agreement {agreement:.4f} is below {least_agreement}")
    if finite and drift > most_drift:
        misses.append(f"embeddings move by {drift:.2g} with the batch, more than {most_drift}")
    return Proof(
        images=len(crops),
        image_source=pixels.source,
        drawn=pixels.drawn,
        worst_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        max_abs_error=float(np.abs(embeddings - reference).max()) if finite else -1.0,
        top10_agreement=agreement,
        other_images_cosine=float(different.mean()),
        batch_drift=drift if finite else -1.0,
        passed=not misses,
        misses=misses,
        backend_version=backend.version,
        hardware=backend.hardware,
        fused_heads=backend.fused_heads,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def with_ranking(proof: Proof, ranking: Ranking, precision: Precision, allowed: float = 0.0) -> Proof:
    """The proof with the ranking of labelled people, and what it misses.

    Args:
        allowed: mAP, as a fraction, that the user let go in any case (INT8's budget).
    """
    share, one_query = KEPT[precision], 1 / ranking.queries
    losses = {
        "mAP": (ranking.reference_mAP, ranking.mAP, allowed),
        "rank-1": (ranking.reference_rank1, ranking.rank1, max(allowed, one_query)),  # nothing less can be seen
    }
    misses = [
        f"{name} {100 * found:.2f} keeps less than {100 * share:g}% of the reference's {100 * expected:.2f}"
        for name, (expected, found, at_least) in losses.items()
        if expected - found > max((1 - share) * expected, at_least) + 1e-9
    ]
    return proof.model_copy(
        update={"ranking": ranking, "misses": [*proof.misses, *misses], "passed": proof.passed and not misses}
    )


def batch_drift(backend: Backend, crops: np.ndarray, embeddings: np.ndarray, sizes: Sequence[int] = BATCHES) -> float:
    """The largest change of a coordinate when images run in other batch sizes, at other places, among other neighbours.

    Each size sees the crops in two random orders, again and again where it is larger than they are many. An engine
    whose rows leak into each other is found so (NVIDIA/TensorRT#4813).
    """
    rng = np.random.default_rng(0)
    drift = 0.0
    for size in sizes:
        for _ in range(2):
            calls = max(1, DRIFT_IMAGES // size)
            order = np.resize(rng.permutation(len(crops)), calls * size)
            for rows in order.reshape(calls, size):
                moved = np.abs(backend(np.ascontiguousarray(crops[rows])) - embeddings[rows]).max()
                drift = max(drift, float(moved)) if np.isfinite(moved) else float("nan")
    return drift
