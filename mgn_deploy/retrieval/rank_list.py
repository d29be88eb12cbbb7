"""The gallery images that were ranked for a query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgn_deploy.datasets.dataset import JUNK

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class RankedImage:
    """One crop as the page shows it.

    Attributes:
        path: the image file; one that is gone or unreadable is shown as a placeholder.
        name: what to call it; any text, also a file name that is not valid UTF-8 (`os.fsdecode`).
        similarity: cosine similarity to the query, None for the query itself or where there is none.
        identity: the person's number, -1 for junk, None if unknown.
        camera: the camera's number, None if unknown.
        distance: re-ranked distance to the query, 0 to 1; None where the similarity ranks.
        probability: that it is the query's person; None without a calibration (`identity.ranked.judge`).
        same: whether the similarity reaches the threshold; None as `probability`.
        load: what gives the crop, of a row that is no file of its own (a box, a video's frame); None: `path` is read.
    """

    path: Path
    name: str
    similarity: float | None
    identity: int | None
    camera: int | None
    distance: float | None = None
    probability: float | None = None
    same: bool | None = None
    load: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class RankList:
    """A query and what the gallery answered, the nearest first.

    `excluded` counts the gallery images that were left out for this query, by reason: own_file, same_camera, junk.
    """

    query: RankedImage
    results: list[RankedImage]
    excluded: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the query's name, identity and camera, and its results by rank, from 1 on."""
        results = [
            {
                "rank": rank,
                "name": one.name,
                "similarity": round(one.similarity or 0.0, 6),
                **({} if one.distance is None else {"reranked_distance": round(one.distance, 6)}),
                **({} if one.probability is None else {"probability": one.probability, "same": one.same}),
                **_labels(one),
            }
            for rank, one in enumerate(self.results, start=1)
        ]
        return {"query": self.query.name, **_labels(self.query), "excluded": self.excluded, "results": results}


def _labels(image: RankedImage) -> dict[str, int | None]:
    return {"identity": image.identity, "camera": image.camera}


def verdict(query: RankedImage, result: RankedImage) -> str:
    """A result's frame: same, other, or unknown where either identity names nobody."""
    if query.identity is None or query.identity == JUNK or result.identity is None:
        return "unknown"
    return "same" if query.identity == result.identity else "other"
