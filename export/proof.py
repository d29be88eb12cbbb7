"""The proof: a backend's embeddings beside the PyTorch reference's, on the same pixels."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import numpy as np

from mgn_deploy.backends import Backend
from mgn_deploy.bundle import Precision, Proof
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images import read_crop
from mgn_deploy.listing import list_images
from mgn_deploy.machine import cpu_name

MOST_IMAGES = 256
FEWEST_IMAGES = 12  # an image and its ten neighbours, and one that is none
BATCH = 8
NEIGHBOURS = 10

# Floors by precision: (worst cosine, top-10 agreement, largest change between batch sizes).
FLOORS: dict[Precision, tuple[float, float, float]] = {"fp32": (0.99999, 0.995, 1e-4)}

# Neighbours whose similarity is this close to the tenth's are equally right: float32 sums differ by this much.
TIE = 2e-6


def proof_crops(folder: Path, height: int, width: int) -> np.ndarray:
    """At most 256 crops of a folder, evenly spread over its sorted names: uint8 `[n, height, width, 3]`.

    Raises:
        UserError: no such folder, or fewer than 12 readable images.
    """
    files = [file.path for file in list_images(folder)]
    step = max(1, -(-len(files) // MOST_IMAGES))
    crops = []
    for path in files[::step]:
        try:
            crops.append(read_crop(path, height, width))
        except UnreadableImage:
            continue  # a proof needs pixels, not every file; the number of images is part of the proof
    if len(crops) < FEWEST_IMAGES:
        raise UserError(f"{folder} has {len(crops)} readable images: a proof needs at least {FEWEST_IMAGES}")
    return np.stack(crops)


def run_in_batches(backend: Backend, crops: np.ndarray, size: int = BATCH) -> np.ndarray:
    """Embeddings of all crops; the last batch is shorter, so two batch sizes are run."""
    return np.concatenate([backend(np.ascontiguousarray(crops[at : at + size])) for at in range(0, len(crops), size)])


def prove(
    backend: Backend, crops: np.ndarray, reference: np.ndarray, precision: Precision, *, image_source: str, drawn: bool
) -> Proof:
    """Compare a backend with the reference's embeddings `[n, dim]` of the same crops `[n, height, width, 3]`."""
    embeddings = run_in_batches(backend, crops)
    singles = np.concatenate([backend(crops[at : at + 1]) for at in range(0, len(crops), max(1, len(crops) // 4))])
    drift = float(np.abs(singles - embeddings[:: max(1, len(crops) // 4)]).max())
    finite = bool(np.isfinite(embeddings).all() and np.isfinite(singles).all())
    cosines = _cosines(embeddings, reference) if finite else np.zeros(len(reference))
    agreement = top_agreement(embeddings, reference, NEIGHBOURS) if finite else 0.0
    similarity = reference.astype(np.float64) @ reference.T.astype(np.float64)
    different = similarity[~np.eye(len(reference), dtype=bool)]

    least_cosine, least_agreement, most_drift = FLOORS[precision]
    misses = [] if finite else ["embeddings are not finite"]
    if cosines.min() < least_cosine:
        misses.append(f"worst cosine {cosines.min():.6f} is below {least_cosine}")
    if agreement < least_agreement:
        misses.append(f"top-10 agreement {agreement:.4f} is below {least_agreement}")
    if finite and drift > most_drift:
        misses.append(f"embeddings move by {drift:.2g} with the batch size, more than {most_drift}")
    return Proof(
        images=len(crops),
        image_source=image_source,
        drawn=drawn,
        worst_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
        max_abs_error=float(np.abs(embeddings - reference).max()) if finite else -1.0,
        top10_agreement=agreement,
        other_images_cosine=float(different.mean()),
        batch_drift=drift if finite else -1.0,
        passed=not misses,
        misses=misses,
        backend_version=backend.version,
        machine=f"{cpu_name()} ({platform.machine()}, {backend.device})",
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def top_agreement(embeddings: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Mean share of each row's k nearest other rows that are among the reference's k nearest (or tie with its k-th)."""
    k = min(k, len(reference) - 1)
    expected = reference.astype(np.float64) @ reference.T.astype(np.float64)
    found = embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)
    np.fill_diagonal(expected, -np.inf)
    np.fill_diagonal(found, -np.inf)
    neighbours = np.argpartition(-found, k - 1, axis=1)[:, :k]
    kth = np.partition(expected, -k, axis=1)[:, -k]
    return float((np.take_along_axis(expected, neighbours, axis=1) >= kth[:, None] - TIE).mean())


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first.astype(np.float64), second.astype(np.float64)
    return (first * second).sum(axis=1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)).clip(1e-12)
