"""What the machines of a cluster run for `embed_on_cluster`: decoders, and engines that write shards."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgn_deploy.datasets.labels import Label
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.run import GalleryReport, Run
from mgn_deploy.gallery.sources import Decoded, Source
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.images.listing import ImageFile

TRIES = 20  # attempts at a part whose workers die
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Part:
    """Images that become a shard, and their labels by name."""

    number: int
    files: Sequence[ImageFile]
    labels: dict[str, Label | None]


@dataclass(frozen=True)
class Written:
    """A part's shard, how many of its images are unlike crops, and what the library logged on the way."""

    number: int
    folder: Path
    shard: ShardEntry
    unlike_crops: int
    said: list[tuple[int, str]]


@contextmanager
def heard() -> Iterator[list[tuple[int, str]]]:
    """Level and sentence of what the library logs meanwhile: on a worker nobody reads it."""
    said: list[tuple[int, str]] = []
    keeper = logging.Handler()
    keeper.emit = lambda record: said.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    _log.addHandler(keeper)
    try:
        yield said
    finally:
        _log.removeHandler(keeper)


@dataclass(frozen=True)
class Engine:
    """How every worker opens the engine."""

    bundle: str
    bundle_id: str
    backend: str
    allow_unproven: bool
    batch_size: int

    def open(self) -> Embedder:
        """Open it; UserError where the folder holds another bundle on this machine."""
        embedder = Embedder.open(self.bundle, self.backend, allow_unproven=self.allow_unproven)
        if embedder.bundle_id != self.bundle_id:
            raise UserError(
                f"{self.bundle} of {os.uname().nodename} is bundle {embedder.bundle_id[:12]}, not "
                f"{self.bundle_id[:12]}: give a folder that is the same on all nodes"
            )
        return embedder


def resolved(engine: Engine) -> tuple[Engine, str]:
    """The engine by the name that a first worker opens it with, and the device that it runs on."""
    import ray

    def look() -> tuple[str, str]:
        backend = engine.open().backend
        return backend.name, backend.device

    gpu = 1 if ray.cluster_resources().get("GPU") else 0
    name, device = ray.get(ray.remote(look).options(num_cpus=1, num_gpus=gpu).remote())
    return replace(engine, backend=name), device


@dataclass(frozen=True)
class Decoder:
    """Decodes parts, on the CPUs of the cluster."""

    source: Source
    height: int
    width: int
    folder: Path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        _attempt(self.folder, row["part"], "decode")
        with heard() as said:
            images = list(self.source.decode(row["part"].files, self.height, self.width))
        return {"part": row["part"], "images": images, "said": said}


class Worker:
    """Embeds decoded parts by an engine of its own, opened for the first one, and writes them."""

    def __init__(self, engine: Engine, manifest: StoreManifest, folder: Path) -> None:
        self._engine, self._manifest, self._folder = engine, manifest, folder
        self._embedder: Embedder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part: Part = row["part"]
        images: list[Decoded] = row["images"]
        manifest, report = self._manifest.model_copy(update={"shards": ()}), GalleryReport()
        with heard() as said, StoreWriter(_attempt(self._folder, part, "embed"), manifest) as writer:
            if self._embedder is None:
                self._embedder = self._engine.open()
            run = Run(writer, self._embedder, self._engine.batch_size, part.labels.get, report, None, Profile())
            run.embed(iter(images), len(images), None)
        shard = writer.manifest.shards[0]
        return {"written": Written(part.number, writer.folder, shard, report.unlike_crops, row["said"] + said)}


def _attempt(folder: Path, part: Part, step: str) -> Path:
    """A folder of its own for an attempt at a part; Ray would repeat it without end where it ends every worker."""
    try:
        mine = Path(tempfile.mkdtemp(dir=folder, prefix=f"{part.number}-{step}-"))
        attempts = len(list(folder.glob(f"{part.number}-{step}-*")))
    except OSError as error:
        raise UserError(
            f"{os.uname().nodename} cannot write to {folder} ({error.strerror}): give a store on a file system that "
            "all nodes share"
        ) from None
    if attempts > TRIES:
        raise UserError(
            f"{TRIES} workers died, or were killed, as they were to {step} the images from {part.files[0].name!r} to "
            f"{part.files[-1].name!r}: is one of them too large for a worker's memory?"
        )
    return mine
