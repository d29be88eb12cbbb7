"""No command looks up a host or leaves anything in the user's home but what it was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import NO_RESOLVER

# The trial of environments runs every command so. Here one process, which has imported no engine, runs the common ones.
SCRIPT = """
import sys
from typer.testing import CliRunner
from mgn_deploy.cli.app import app
for line in sys.argv[1].splitlines():
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, (line, done.output, done.exception)
"""
LINES = """init -o weights --init random --backbone resnet18 --size 96x32 --branches 1,2
export weights -o bundle --no-flip
prove --bundle bundle
embed CROPS -o store --bundle bundle --labels market1501
search store store --json --rerank
distmat store store -o distances.npy
evaluate store store
index build store -o index
store verify store"""


def run(home: Path, *command: object) -> list[str]:
    """Run Python with a home of its own and a closed resolver; what it leaves in the home."""
    (home.parent / "site").mkdir()
    (home.parent / "site/sitecustomize.py").write_text(NO_RESOLVER)
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**environment, "HOME": str(home), "PYTHONPATH": str(home.parent / "site")},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a host was asked for" not in done.stderr
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_looking_around_leaves_nothing(tmp_path):
    assert run(tmp_path / "home", "-m", "mgn_deploy", "doctor") == []


@pytest.mark.slow
def test_the_way_from_weights_to_answers_leaves_nothing_and_asks_for_no_host(tmp_path, crops):
    assert run(tmp_path / "home", "-c", SCRIPT, LINES.replace("CROPS", str(crops))) == []
    assert (tmp_path / "index").is_dir()
