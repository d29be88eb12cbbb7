"""Distances, rank lists and ranking quality."""

from __future__ import annotations

from typing import Literal

Metric = Literal["cosine", "euclidean"]
QueryPooling = Literal["avg", "max"]  # of the images that a multiple query stands for
DEFAULT_TOLERANCE = 0.5  # points that an engine's rank-1 and mAP may differ from the reference's
