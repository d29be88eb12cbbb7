"""No command looks up a host or leaves anything in the user's home but what it was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import NO_RESOLVER

# Every command's line in the trial of environments, one after the other in a process whose engines nobody imported.
EVERY_COMMAND = """
import logging, os, signal, sys, threading
from pathlib import Path
from tests.trials import environments
from typer.testing import CliRunner
from mgn_deploy.cli.app import app

made = Path(sys.argv[1])
environments.make(made)
left_out = ("demo",)  # which is init to validate
for words, line in environments.LINES.items():
    if words in left_out:
        continue
    if words == "serve":
        threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    for new in ("new", "kept"):
        if (made / new).exists():
            (made / new).rename(made / f"{new}-{len(os.listdir(made))}")
    done = CliRunner().invoke(app, [*words.split(), *(word.replace("W/", f"{made}/") for word in line.split())])
    assert done.exit_code == (143 if words == "serve" else 0), (words, done.output, done.exception)
    print(words)
"""


def run(home: Path, *command: object) -> tuple[str, list[str]]:
    """Run Python with a home of its own and a closed resolver; what it prints, and what it leaves in the home."""
    (home.parent / "site").mkdir()
    (home.parent / "site/sitecustomize.py").write_text(NO_RESOLVER)
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**environment, "HOME": str(home), "PYTHONPATH": f"{home.parent / 'site'}:{Path(__file__).parents[1]}"},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a host was asked for" not in done.stderr
    return done.stdout, sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_looking_around_leaves_nothing(tmp_path):
    assert run(tmp_path / "home", "-m", "mgn_deploy", "doctor")[1] == []


@pytest.mark.slow
def test_no_command_leaves_anything_but_its_cache_or_asks_for_a_host(tmp_path):
    printed, left = run(tmp_path / "home", "-c", EVERY_COMMAND, tmp_path / "made")
    assert len(printed.split("\n")) > 30
    assert [name for name in left if not name.startswith(".cache/mgn-deploy/")] == []
