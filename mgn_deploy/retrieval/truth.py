"""Who is the right answer to whom, who is nobody, and what a protocol leaves out of a ranking."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mgn_deploy.datasets.dataset import NO_CAMERA, Dataset, LabelledImage
from mgn_deploy.errors import UserError


class Truth:
    """Labels of q queries and g gallery images, and the rules of the Market-1501 protocol (Zheng et al. 2015).

    Junk is ignored. A gallery image of the query's identity is a right answer, unless the query's own camera made it or
    it is the query itself: then it is removed. Everybody else is a wrong answer, distractors among them.

    Attributes:
        shape: (q, g).
        query_identities: int64 `[q]`.
        kept: gallery indices without junk, ascending. "Columns" below are positions in it.
        identities: int64, of the columns.
        by_identity: the columns sorted by their identities; of one identity they ascend.
        count: int64 `[q]`, how many columns show the query's identity; 0 where it names nobody.
        nobody: bool `[q]`, queries that are junk or distractors.
    """

    def __init__(
        self,
        query_identities: ArrayLike,
        query_cameras: ArrayLike | None,
        gallery_identities: ArrayLike,
        gallery_cameras: ArrayLike | None,
        *,
        junk: Collection[int] = (),
        distractors: Collection[int] = (),
        itself: ArrayLike | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Take the labels, integers `[q]` or `[g]`.

        Args:
            query_identities, gallery_identities: people's numbers.
            query_cameras, gallery_cameras: -2 (`NO_CAMERA`) where unknown, which is no other unknown one; None: the
                protocol has no cameras, and every other image of a person is a right answer.
            junk, distractors: the identities that are nobody's; by default every number is a person's.
            itself: for each query its own index in the gallery, -1 where it is not there.
            shape: (q, g) that the labels have to have; by default their own.

        Raises:
            UserError: labels that are no integers or of another length.
        """
        if shape is None:
            shape = (len(np.asarray(query_identities)), len(np.asarray(gallery_identities)))
        self.shape = (shape[0], shape[1])
        self.query_identities = _labels("query identities", query_identities, shape[0])
        gallery = _labels("gallery identities", gallery_identities, shape[1])
        self.kept = np.flatnonzero(~np.isin(gallery, list(junk)))
        self.identities = gallery[self.kept]
        self._cameras: tuple[np.ndarray, np.ndarray] | None = None
        if query_cameras is not None and gallery_cameras is not None:
            mine = _labels("query cameras", query_cameras, shape[0])
            theirs = _labels("gallery cameras", gallery_cameras, shape[1])
            self._cameras = mine, theirs[self.kept]
        self._itself = np.full(shape[0], -1) if itself is None else _labels("own rows", itself, shape[0])
        # Columns grouped by identity: those of a query's identity are one run, [first, first + count).
        self.by_identity = np.argsort(self.identities, kind="stable")
        grouped = self.identities[self.by_identity]
        self._first = np.searchsorted(grouped, self.query_identities, side="left")
        self.count = np.searchsorted(grouped, self.query_identities, side="right") - self._first
        self.nobody = np.isin(self.query_identities, [*junk, *distractors])
        self.count[self.nobody] = 0

    @classmethod
    def of_dataset(cls, data: Dataset, *, cameras: bool = True) -> Truth:
        """Of a data set's query and gallery; without `cameras`, or where it has none, by identities alone."""

        def of(images: Sequence[LabelledImage], attribute: str) -> np.ndarray:
            return np.array([getattr(image, attribute) for image in images], np.int64)

        by_camera = cameras and data.has_cameras
        return cls(
            of(data.query, "identity"),
            of(data.query, "camera") if by_camera else None,
            of(data.gallery, "identity"),
            of(data.gallery, "camera") if by_camera else None,
            junk=data.junk,
            distractors=data.distractors,
        )

    def own(self, queries: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (row within `queries`, column) of one identity, rows ascending, and whether the protocol removes it."""
        count = self.count[queries]
        row = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        column = self.by_identity[self._first[queries][row] + nth]
        removed = self.kept[column] == self._itself[queries][row]
        if self._cameras is not None:
            mine, theirs = self._cameras
            removed |= (theirs[column] == mine[queries][row]) & (theirs[column] != NO_CAMERA)
        return row, column, removed

    def unmatched(self) -> np.ndarray:
        """Queries without a right answer, ascending indices."""
        row, _, removed = self.own(slice(0, self.shape[0]))
        return np.setdiff1d(np.arange(self.shape[0]), row[~removed])


def _labels(name: str, labels: ArrayLike, length: int) -> np.ndarray:
    array = np.asarray(labels)
    if array.shape != (length,):
        raise UserError(f"{name} have shape {list(array.shape)}, but have to be [{length}], one an image")
    if length and array.dtype.kind not in "iu":
        raise UserError(f"{name} are {array.dtype}, but have to be integers")
    return array
