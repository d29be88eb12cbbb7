"""How much of what exact search finds an index finds."""

from __future__ import annotations

import numpy as np

from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.nearest import Candidates, top_k, top_k_of_candidates

NEIGHBOURS = 10
SAMPLE = 1000
SAME = 1e-6  # similarities closer than this are a tie: float32 sums differ by their order


class RecallSample:
    """Rows of a store that are asked for, and how similar their exact neighbours are.

    Attributes:
        size: how many rows.
    """

    def __init__(self, store: Store, seed: int) -> None:
        """Draw at most 1,000 rows and search for them exactly, once through the store, themselves left out."""
        self._store = store
        self._rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:SAMPLE])
        self.size = len(self._rows)
        self._k = min(NEIGHBOURS, len(store) - 1)
        self._asked = np.asarray(store.take(self._rows), np.float32)
        if self._k:
            self._exact = top_k(self._asked, store, self._k, excluded=self._itself)[1]

    def recall(self, candidates: Candidates) -> float:
        """The share of the exact 10 nearest that is found after re-scoring; a tie with the last of them counts."""
        if not self._k:
            return 1.0  # the only row has no neighbour to miss
        found = top_k_of_candidates(self._asked, self._store, self._k, candidates, excluded=self._itself)[1]
        return float((found >= self._exact[:, -1:] - SAME).mean())

    def _itself(self, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows[queries]
        return np.arange(len(rows)), rows
