"""On real people: a threshold from 643 of them does on 100 others what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mgn_deploy.datasets import open_data
from mgn_deploy.embedder import Embedder
from mgn_deploy.identity.calibrate import calibrate
from mgn_deploy.identity.pairs import genuine_and_impostor

BESIDE = Path(__file__).parents[3] / "shared"  # of the repository
PEOPLE = (BESIDE if BESIDE.is_dir() else Path("/work/shared")) / "data" / "cuhk03-market"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEOPLE.is_dir(), reason=f"{PEOPLE} is not there"),
]


def test_the_false_accept_rate_on_others_is_the_one_that_was_asked_for(embedder: Embedder):
    """By a network that has seen none of them. The interval is over the 100 people."""
    data = open_data(f"folder:{PEOPLE}", ("train", "query", "gallery"))
    calibration = calibrate(data, embedder, ("train",), replicates=20, max_pairs=500_000, batch_size=32)
    assert calibration.data.people == 643
    others = [*data.query, *data.gallery]
    _, people = np.unique([image.identity for image in others], return_inverse=True)
    assert people.max() + 1 == 100
    rows = embedder.embed([image.path for image in others], batch_size=32)
    _, impostor = genuine_and_impostor(rows, people, np.array([image.camera for image in others]))
    for far in (1e-2, 1e-3):
        accepted = impostor.similarities >= calibration.decide(far).threshold
        drawn = []
        for times in np.random.default_rng(0).multinomial(100, np.full(100, 0.01), 300):
            weights = times[impostor.first] * times[impostor.second]
            drawn.append(weights @ accepted / weights.sum())
        low, high = np.percentile(drawn, (2.5, 97.5))
        print(f"FAR {far:g}: {accepted.mean():.3g} on the 100 others ({low:.3g} to {high:.3g})")
        assert low <= far <= high
