"""A bench of a few short rounds."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from mgn_deploy.bench import speed


@contextmanager
def short(rounds):
    """A few rounds of short slices: a busy machine takes longer for them, and still does them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ROUNDS", rounds)
        patch.setattr(speed, "SLICE", (0.02, 0.05))
        patch.setattr(speed, "RUN", 0.05)
        yield patch
