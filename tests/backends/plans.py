"""A plan as a manifest names it, and a bundle that has one."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import EngineEntry, FileEntry


def rtx(**changes) -> EngineEntry:
    facts = {"file": "a.plan", "engine": "tensorrt-rtx", "version": "1.7.1", "compute_capability": "8.9"}
    return EngineEntry(**{**facts, "batch": (1, 2, 4), **changes})


def with_plan(bundle_folder: Path, folder: Path, plan: EngineEntry, content: bytes = b"a plan") -> Bundle:
    """The bundle with a plan beside its graph."""
    bundle = Bundle.open(bundle_folder)
    for name in bundle.manifest.files:
        (folder / name).symlink_to(bundle_folder / name)
    (folder / plan.file).write_bytes(content)
    file = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    files = {**bundle.manifest.files, plan.file: file}
    manifest = bundle.manifest.model_copy(update={"files": files, "engines": [plan]})
    return dataclasses.replace(bundle, folder=folder, manifest=manifest)
