"""Folders as real people have them: no file is lost without being counted (`tests/trials/folders.py`)."""

from __future__ import annotations

import pytest
from hostile import permissions_apply
from trials.folders import FOLDERS, counted


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_every_file_is_embedded_failed_or_skipped(make, tmp_path, embedder):
    with permissions_apply():
        found, right = counted(make, tmp_path, embedder)
    assert found == right
