"""What is written never replaces a device or a pipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file


def test_a_pipe_is_refused_and_stays(tmp_path: Path):
    pipe = tmp_path / "page.html"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="is a device or a pipe"), atomic_file(pipe) as file:
        file.write(b"page")
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path):
    (tmp_path / "site").mkdir()
    link = tmp_path / "page.html"
    link.symlink_to("site/page.html")
    for content in (b"first", b"second"):
        with atomic_file(link) as file:
            file.write(content)
        assert link.is_symlink()
        assert (tmp_path / "site" / "page.html").read_bytes() == content
