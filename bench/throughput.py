"""Images a second of the bare engine, of `embed` from image files to a store, and of PyTorch eager, in turns.

Turns, because a shared machine's speed drifts: each ratio is of neighbours in time, and the median ratio is what to
quote.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.bench.report import cpu
from mgn_deploy.datasets.drawn import draw_market1501
from mgn_deploy.embedder import Embedder, check_batch_size
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.gallery.embed import embed_folder
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import list_images

_log = logging.getLogger("mgn_deploy")

BARE, EMBED, REFERENCE = "bare engine", "embed (files to store)", "PyTorch eager"


@dataclass
class Series:
    """Rates of the counted runs in images/s; `ratio` is the median, over the turns, of this rate by the bare
    engine's."""

    rates: list[float] = field(default_factory=list)
    ratio: float = 1.0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Throughput:
    model: str
    mirror_average: bool  # which doubles the work, of the engine's and of the reference's alike
    backend: str
    batch: int
    images: int
    machine: str
    series: dict[str, Series]

    def to_dict(self) -> dict[str, Any]:
        series = {
            name: {
                "median": round(one.median, 3),
                "rates": [round(rate, 3) for rate in one.rates],
                "of_bare_engine": round(one.ratio, 4),
            }
            for name, one in self.series.items()
        }
        return {
            "model": self.model,
            "mirror_average": self.mirror_average,
            "backend": self.backend,
            "batch": self.batch,
            "images": self.images,
            "machine": self.machine,
            "images_per_second": series,
        }


def measure(
    bundle: str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    backend: str = "auto",
    *,
    batch_size: int = 8,
    count: int = 64,
    runs: int = 5,
    reference: bool = True,
) -> Throughput:
    """Measure a bundle on `count` image files (drawn people without a folder), `runs` times each, in turns.

    Raises:
        UserError: no bundle, no such backend, or a folder with too few readable images for one batch.
    """
    check_batch_size(batch_size)
    if runs < 1:
        raise UserError(f"--runs {runs}: at least 1 run has to be counted")
    embedder = Embedder.open(bundle, backend)
    with tempfile.TemporaryDirectory(prefix="mgn-deploy-bench-") as scratch:
        folder, crops = _prepare(Path(scratch), images, count, batch_size, embedder)
        tasks: dict[str, Callable[[], None]] = {
            BARE: lambda: _run_bare(embedder.backend, crops, batch_size),
            EMBED: lambda: _run_embed(folder, Path(scratch) / "store", embedder, batch_size),
        }
        if reference and embedder.backend.name != "torch":
            original = Embedder.open_reference(bundle).backend
            tasks[REFERENCE] = lambda: _run_bare(original, crops, batch_size)
        series = {name: Series() for name in tasks}
        for turn in range(runs + 1):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                rate = len(crops) / (time.perf_counter() - start)
                if turn:
                    series[name].rates.append(rate)
            _log.info(
                f"turn {turn}/{runs}"
                + (": " + ", ".join(f"{n} {s.rates[-1]:.1f}" for n, s in series.items()) if turn else " (not counted)")
            )
    for one in series.values():
        one.ratio = statistics.median(rate / bare for rate, bare in zip(one.rates, series[BARE].rates, strict=True))
    config = embedder.bundle.config
    model = f"{config.backbone} MGN {config.height}x{config.width} {embedder.bundle.manifest.precision}"
    return Throughput(
        model,
        embedder.bundle.manifest.flip,
        f"{embedder.backend.name} {embedder.backend.version}",
        batch_size,
        len(crops),
        cpu(),
        series,
    )


def _prepare(
    scratch: Path, images: str | os.PathLike[str] | None, count: int, batch_size: int, embedder: Embedder
) -> tuple[Path, np.ndarray]:
    """A folder of up to `count` image files that can be read, and their crops.

    Whole batches only: `embed` fills up its last batch, and filling is not what is measured.
    """
    if images is None:
        images = scratch / "drawn"
        draw_market1501(images, train_identities=max(2, count // 8), test_identities=2)
    chosen = scratch / "chosen"
    chosen.mkdir()
    readable: list[tuple[Path, np.ndarray]] = []
    for file in list_images(images):
        if len(readable) == count:
            break
        try:
            readable.append((file.path, read_crop(file.path, embedder.height, embedder.width)))
        except UnreadableImage:
            continue
    whole = len(readable) // batch_size * batch_size
    if not whole:
        raise UserError(
            f"{len(readable)} readable images are fewer than a batch of {batch_size}: give more, or a smaller --batch"
        )
    for number, (path, _) in enumerate(readable[:whole]):
        shutil.copyfile(path, chosen / f"{number:06d}{path.suffix}")
    return chosen, np.stack([crop for _, crop in readable[:whole]])


def _run_bare(backend: Backend, crops: np.ndarray, batch_size: int) -> None:
    """As `embed` calls it: a backend that keeps batches on their way does so here, too."""
    for _ in backend.stream(crops[at : at + batch_size] for at in range(0, len(crops), batch_size)):
        pass


def _run_embed(folder: Path, store: Path, embedder: Embedder, batch_size: int) -> None:
    embed_folder(folder, store, embedder, batch_size=batch_size)
    shutil.rmtree(store)
