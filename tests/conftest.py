"""Small real models and images, made once a session."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner, Result

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Where tests run side by side, each process has a core: two engines with a thread a core each get in each other's
    # way.
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(CORES)]})
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: before PyTorch is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mgn-tests-")  # no test reads or fills the user's

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.config import ModelConfig
from mgn_deploy.datasets.drawn import draw_crop
from mgn_deploy.embedder import Embedder

# Of 16 channels and not 8: OpenVINO's INT8 kernels give other sums from run to run where channels are no multiple of 16
# (2026.4, AVX2, two threads; ARCHITECTURE.md).
SMALL = ModelConfig(backbone="resnet18", base_width=16, reduced_width=16, height=96, width=32)


def pytest_configure() -> None:
    """Under nohup SIGHUP is ignored, and the tests of signals send it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def trace() -> Iterator[Callable[..., Any]]:
    """`build_graph`, which takes seconds, but once for the same model: what it makes depends on nothing else
    (`test_graph.py`). The exporter uses it, too."""
    import onnx

    from mgn_deploy.export.graph.trace import build_graph

    traced: dict[bytes, bytes] = {}

    def trace(model: Any, flip: bool = True) -> onnx.ModelProto:
        digest = hashlib.sha256(repr((model.config, flip)).encode())
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        key = digest.digest()
        if key not in traced:
            traced[key] = build_graph(model, flip).SerializeToString()
        return onnx.load_from_string(traced[key])

    with patch("mgn_deploy.export.precision.convert.build_graph", trace):
        yield trace


@pytest.fixture(scope="session")
def weights(trace: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of a very small MGN whose batch norms are those of a trained one: not all zero and one."""
    import torch
    from torch import nn

    from mgn_deploy.train.weights import new_model, save_weights

    model = new_model(SMALL, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    folder = tmp_path_factory.mktemp("weights") / "small"
    save_weights(model, folder)
    return folder


@pytest.fixture
def model(weights: Path) -> Any:
    """The network of `weights`, a test's own to change."""
    from mgn_deploy.train.weights import load_weights

    return load_weights(weights)


@pytest.fixture(scope="session")
def bundle_folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proven bundle of `weights`. Tests that change a bundle copy it first."""
    from mgn_deploy.export.exporter import export_bundle

    folder = tmp_path_factory.mktemp("bundle") / "small"
    bundle = export_bundle(weights, folder)
    assert all(proof.passed for proof in bundle.manifest.proofs.values()), bundle.manifest.proofs
    return folder


@pytest.fixture(scope="session")
def embedder(bundle_folder: Path) -> Embedder:
    """The small bundle on ONNX Runtime."""
    return Embedder.open(Bundle.open(bundle_folder), "onnxruntime")


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty drawn crops as JPEG files with Market-1501 names, in two folders. Tests that change files copy it first."""
    folder = tmp_path_factory.mktemp("crops")
    for identity in range(1, 11):
        for camera in (1, 2):
            for frame in (0, 1):
                place = folder / f"camera {camera}"
                place.mkdir(exist_ok=True)
                draw_crop(identity, camera, frame).save(
                    place / f"{identity:04d}_c{camera}s1_{frame:06d}_00.jpg", quality=90
                )
    return folder


@pytest.fixture
def photo(crops: Path) -> Path:
    """One of the crops, which no test changes."""
    return crops / "camera 1" / "0001_c1s1_000000_00.jpg"


@pytest.fixture(scope="session")
def gallery_store(bundle_folder: Path, crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The forty crops embedded by the small bundle. Tests that add to it copy it first."""
    from mgn_deploy.gallery.embed import embed_folder

    folder = tmp_path_factory.mktemp("store") / "gallery"
    embed_folder(crops, folder, Embedder.open(bundle_folder, "onnxruntime"), labels="market1501")
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Six drawn crops, a.jpg to f.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, letter in enumerate("abcdef"):
        draw_crop(number, 1, 0).save(folder / f"{letter}.jpg", quality=90)
    return folder


@contextmanager
def logged() -> Iterator[list[str]]:
    """The sentences that the library says meanwhile, INFO and above."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logger, handler = logging.getLogger("mgn_deploy"), Keeper()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The sentences that the library says in a test."""
    with logged() as sentences:
        yield sentences


def mgn_deploy(*arguments: object) -> Result:
    """Run `mgn-deploy ARGUMENTS` in this process, which has imported PyTorch and the engines once."""
    from mgn_deploy.cli.app import app

    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(app, [*map(str, arguments)], prog_name="mgn-deploy", catch_exceptions=False)
