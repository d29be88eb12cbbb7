"""People to validate on, and a bundle that ranks them otherwise."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import FileEntry, write_manifest
from mgn_deploy.datasets.drawn import draw_market1501


def draw(folder: Path) -> Path:
    draw_market1501(folder, train_identities=1, test_identities=8)
    return folder


def spoilt(bundle_folder: Path, place: Path) -> Path:
    """A copy of the bundle with noise on its heads, which changes rankings; proven by nobody."""
    shutil.copytree(bundle_folder, place)
    graph = onnx.load(place / "graph.onnx")
    (tensor,) = [one for one in graph.graph.initializer if one.name == "heads.weight"]
    values = numpy_helper.to_array(tensor)
    noise = 2 * values.std() * np.random.default_rng(0).normal(size=values.shape)
    tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(np.float32), tensor.name))
    content = graph.SerializeToString()
    (place / "graph.onnx").write_bytes(content)
    manifest = Bundle.open(bundle_folder).manifest
    files = {
        **manifest.files,
        "graph.onnx": FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content)),
    }
    write_manifest(place, manifest.model_copy(update={"files": files, "proofs": {}}))
    return place
