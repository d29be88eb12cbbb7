"""No command looks up a host or leaves anything in the user's home but what it was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python's resolver is closed.
SITE = """
import socket
def refused(*arguments, **options):
    raise AssertionError(f"a host was asked for: {arguments}")
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refused
"""


@pytest.fixture
def run(tmp_path):
    """Run `mgn-deploy` in a home of its own; what it leaves there."""
    home, site = tmp_path / "home", tmp_path / "site"
    home.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)

    def command(*arguments: object) -> list[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))},
            "HOME": str(home),
            "PYTHONPATH": str(site),
        }
        done = subprocess.run(
            [sys.executable, "-m", "mgn_deploy", *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "a host was asked for" not in done.stderr
        return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())

    return command


def test_looking_around_leaves_nothing(run):
    assert run("doctor") == []


@pytest.mark.slow
def test_the_way_from_weights_to_answers_leaves_nothing(run, crops: Path, tmp_path: Path):
    for arguments in (
        ["init", "-o", "weights", "--init", "random", "--backbone", "resnet18", "--size", "96x32"],
        ["export", "weights", "-o", "bundle"],
        ["prove", "--bundle", "bundle"],
        ["embed", crops, "-o", "store", "--bundle", "bundle", "--labels", "market1501"],
        ["search", "store", "store", "--json", "--rerank"],
        ["distmat", "store", "store", "-o", "distances.npy"],
        ["evaluate", "store", "store"],
        ["store", "verify", "store"],
    ):
        assert run(*arguments) == [], arguments
    assert (tmp_path / "distances.npy").is_file()
