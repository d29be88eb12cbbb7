"""Two images: the same person or not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mgn_deploy.embedder import Embedder, ImageLike
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import DEFAULT_FAR, Calibration, check_far, how_to_calibrate


@dataclass(frozen=True)
class Comparison:
    """What two images' similarity says.

    Attributes:
        similarity: cosine, -1 to 1.
        probability: that it is one person; None without a calibration, as all that follow.
        prior: the share of genuine pairs that the probability assumes.
        same: whether the similarity reaches `threshold`.
        threshold: of the false-accept rate `far`.
        note: what a reader must know, or None.
    """

    similarity: float
    probability: float | None = None
    prior: float | None = None
    same: bool | None = None
    far: float | None = None
    threshold: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare_images(
    first: ImageLike,
    second: ImageLike,
    embedder: Embedder,
    *,
    far: float = DEFAULT_FAR,
    prior: float | None = None,
) -> Comparison:
    """Embed two images and compare them by the bundle's calibration, where it has one.

    Args:
        first, second: paths, PIL images or uint8 RGB arrays.
        embedder: opened from a bundle.
        far: the false-accept rate at which the threshold is drawn.
        prior: the share of genuine pairs among those that are compared; None: the calibration's.

    Raises:
        UserError: an image cannot be read, the calibration is broken, or a rate or prior that is
            none.
    """
    check_far(far)
    calibration = Calibration.find(embedder.bundle)
    a, b = embedder.embed([first, second], batch_size=2)
    result = compare(a, b, calibration, far=far, prior=prior)
    if calibration is None:
        note = f"no probability without a calibration: {how_to_calibrate(embedder.bundle)}"
        return Comparison(result.similarity, note=note)
    return result


def compare(
    first: np.ndarray,
    second: np.ndarray,
    calibration: Calibration | None,
    *,
    far: float = DEFAULT_FAR,
    prior: float | None = None,
) -> Comparison:
    """Compare two embeddings, unit rows `[d]`, by a calibration of their bundle, or by similarity alone.

    Raises:
        UserError: the embeddings differ in length or are not finite, or a rate or prior that is none.
    """
    check_far(far)
    if first.shape != second.shape or first.ndim != 1:
        raise UserError(f"embeddings of shapes {list(first.shape)} and {list(second.shape)} cannot be compared")
    similarity = float(np.clip(np.dot(first.astype(np.float32), second.astype(np.float32)), -1, 1))
    if not np.isfinite(similarity):
        raise UserError("an embedding is not finite: embed the image again")
    if calibration is None:
        return Comparison(similarity)
    decision = calibration.decide(far)
    return Comparison(
        similarity,
        float(calibration.probability(similarity, prior)),
        calibration.prior if prior is None else prior,
        similarity >= decision.threshold,
        decision.far,
        decision.threshold,
        decision.problem,
    )
