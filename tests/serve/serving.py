"""Services over the small bundle, and servers on free ports of this machine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXTRA = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "httpx")
for package in EXTRA:
    pytest.importorskip(package, reason=f"{package} is not installed: the extras `serve` and `dev` bring it")

from mgn_deploy.bundle.bundle import Bundle  # noqa: E402
from mgn_deploy.embedder import Embedder  # noqa: E402
from mgn_deploy.gallery.store import Store  # noqa: E402
from mgn_deploy.identity.calibrate import calibrate_embeddings  # noqa: E402
from mgn_deploy.serve.limits import Limits  # noqa: E402
from mgn_deploy.serve.server import HttpServer  # noqa: E402
from mgn_deploy.serve.service import Service  # noqa: E402


def open_service(bundle: Path, store: Path | None = None, people: Path | None = None, **limits: float) -> Service:
    """With an engine of its own; whoever asked closes it."""
    return Service(Embedder.open(bundle, "onnxruntime"), store, people, limits=Limits(**limits))


def with_calibration(bundle: Path, store: Path, folder: Path) -> Path:
    """A copy of a bundle, calibrated on a store of it."""
    copied, images = Bundle.open(shutil.copytree(bundle, folder)), Store.open(store)
    calibrate_embeddings(
        images.embeddings(),
        images.identities() - images.identities().min(),
        images.cameras(),
        bundle_id=copied.id,
        backend=images.manifest.backend,
        source="the store",
        replicates=20,
    ).write(copied)
    return copied.folder


@contextmanager
def running(service: Service, **options: object) -> Iterator[HttpServer]:
    """A server in a thread; the service is closed at the end."""
    server = HttpServer(service, port=0, **options)
    started = threading.Event()
    thread = threading.Thread(target=server.run, args=(started.set,))
    thread.start()
    try:
        assert started.wait(60)
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def files(*paths: Path) -> list:
    """These images as fields of a form."""
    return [("image", (path.name, path.read_bytes())) for path in paths]
