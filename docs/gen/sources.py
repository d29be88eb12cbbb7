"""A hook of MkDocs: the five top-level folders under their one import name, where mkdocstrings looks for them."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "build" / "docs-source"  # as mkdocs.yml has it


def on_startup(command: str, dirty: bool) -> None:
    """Link the folders before mkdocstrings looks for them."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    package = SOURCES / "mgn_deploy"
    package.mkdir(parents=True)
    for part in [*(ROOT / "mgn_deploy").iterdir(), *(ROOT / name for name in ("train", "export", "kernels", "bench"))]:
        (package / part.name).symlink_to(part)
