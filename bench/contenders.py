"""Who runs in `mgn-deploy bench`: bundles opened by engines, the images that they get, and their tasks of one round."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.registry import ENGINES, engine_row
from mgn_deploy.bench.environment import Meter, PeakMemory, joules, sentence
from mgn_deploy.bench.result import Row
from mgn_deploy.bench.timing import calls, warm_up
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UnreadableImage, UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.images.listing import list_images
from mgn_deploy.packages import import_problem

REFERENCE = "torch"
Rivals = Mapping[str, Callable[[Bundle], Backend]]

_log = logging.getLogger("mgn_deploy")


@dataclass
class Images:
    """Readable image files and their pixels at one size, uint8 `[n, height, width, 3]`."""

    paths: list[Path]
    encoded: list[bytes]
    crops: np.ndarray


def read_images(folder: Path, height: int, width: int, count: int, batch: int) -> Images:
    """Read up to `count` files, and a batch at least; those that cannot be read are passed over, with a warning that
    counts them.

    Raises:
        UserError: no such folder, or fewer readable images than a batch.
    """
    paths, crops, unreadable = list[Path](), list[np.ndarray](), 0
    for path in filter(None, (file.path for file in list_images(folder))):
        if len(paths) == max(count, batch):
            break
        try:
            crops.append(read_crop(path, height, width))
            paths.append(path)
        except UnreadableImage:
            unreadable += 1
    if unreadable:
        _log.warning(f"{unreadable} images of {folder} cannot be read and are not measured")
    if len(paths) < batch:
        raise UserError(
            f"{len(paths)} readable images are fewer than a batch of {batch}: give more, or a smaller --batch"
        )
    return Images(paths, [path.read_bytes() for path in paths], np.stack(crops))


@dataclass
class Contender:
    """A row that is being measured."""

    row: Row
    embedder: Embedder
    images: Images
    reference: tuple[Any, ...]  # what the rows that share a PyTorch reference have in common
    meter: Meter = field(default_factory=Meter)
    folder: Path | None = None  # of `row.images` files, where `embed` is measured
    energy: float = 0.0
    embedded: int = 0

    def warm_up(self, limit: float, seconds: float) -> None:
        """Warm up, and settle how many images an offline run of about `seconds` has: whole batches, as `embed` fills up
        its last one, and filling is not what is measured. Where they are more than there are, they come again."""
        batch = self._batch(0)
        self.row.warm_up = warm_up(lambda: self.embedder.backend(batch), limit)
        took = self.row.warm_up.seconds / self.row.warm_up.calls
        self.row.images = self.row.batch * max(2, round(seconds / took))

    def copy_files(self, folder: Path) -> None:
        """Make the folder that `embed` reads, for an engine that it can have."""
        if self.row.engine not in ENGINES or self.row.engine == REFERENCE:
            return
        folder.mkdir(parents=True)
        for number in range(self.row.images):
            path = self.images.paths[number % self._whole]
            shutil.copyfile(path, folder / f"{number:06d}{path.suffix}")
        self.folder = folder

    def tasks(self, seconds: float) -> dict[str, Callable[[], Any]]:
        """By name: latencies give the seconds of their calls, the others images a second."""
        tasks: dict[str, Callable[[], Any]] = {
            "pixels": lambda: calls(lambda: self.embedder.backend(self._batch(0)), seconds),
            "image_bytes": lambda: calls(self._from_bytes, seconds),
            "offline": self._offline,
        }
        if self.folder is not None:
            tasks["embed"] = self._embed
        return {name: self.meter(task) for name, task in tasks.items()}

    @property
    def _whole(self) -> int:
        """Images of the whole batches that there are."""
        return len(self.images.paths) // self.row.batch * self.row.batch

    def _batch(self, at: int) -> np.ndarray:
        return self.images.crops[at % self._whole :][: self.row.batch]

    def _from_bytes(self) -> None:
        size = self.embedder.height, self.embedder.width
        crops = [read_crop(content, *size) for content in self.images.encoded[: self.row.batch]]
        self.embedder.backend(np.stack(crops))

    def _offline(self) -> float:
        """As `embed` calls it: an engine that keeps batches on their way does so here, too."""
        before, start = joules(), time.perf_counter()
        for _ in self.embedder.backend.stream(self._batch(at) for at in range(0, self.row.images, self.row.batch)):
            pass
        took, after = time.perf_counter() - start, joules()
        if before and after and after[0] >= before[0]:  # RAPL's counters begin again at their range
            self.energy += after[0] - before[0]
            self.embedded += self.row.images
        return self.row.images / took

    def _embed(self) -> float:
        from mgn_deploy.gallery.embed import embed_folder

        assert self.folder is not None
        store = self.folder.parent / "store"
        start = time.perf_counter()
        embed_folder(self.folder, store, self.embedder, batch_size=self.row.batch)
        took = time.perf_counter() - start
        shutil.rmtree(store)
        return self.row.images / took


def open_contenders(
    bundles: Sequence[Bundle],
    engines: Sequence[str],
    batches: Sequence[int],
    images: Callable[[int, int], Images],
    reference: bool,
    allow_unproven: bool,
    rivals: Rivals,
) -> tuple[list[Contender], list[Row]]:
    """Open every bundle by every engine; rows of what does not open have the reason.

    Args:
        bundles: opened ones.
        engines: names; none: those with a passed proof in the bundle that are installed.
        batches: images a call.
        images: of a height and width.
        reference: also open the PyTorch reference, once for bundles of the same weights.
        allow_unproven: also run engines without a passed proof.
        rivals: further contenders by name, opened once for bundles of the same weights.
    """
    for name in engines:
        engine_row(name)
    contenders, left_out, references = list[Contender](), list[Row](), set[tuple[Any, ...]]()
    for bundle in bundles:
        manifest = bundle.manifest
        shared = manifest.source_weights_sha256, manifest.flip
        proven = [name for name, proof in manifest.proofs.items() if proof.passed]
        here = [name for name in ENGINES if name in proven and name != REFERENCE and not ENGINES[name].load().missing()]
        wanted = list(engines or here)
        if reference and shared not in references and REFERENCE not in wanted:
            wanted.append(REFERENCE)
        others = {} if shared in references else rivals
        references.add(shared)
        for engine in dict.fromkeys([*wanted, *others]):
            embedder, row = _open(bundle, engine, others.get(engine), allow_unproven)
            if embedder is None:
                left_out += [row.model_copy(update={"batch": batch}) for batch in batches]
                continue
            pixels = images(embedder.height, embedder.width)
            for batch in batches:
                contenders.append(
                    Contender(row.model_copy(deep=True, update={"batch": batch}), embedder, pixels, (*shared, batch))
                )
    return contenders, left_out


def _open(
    bundle: Bundle, engine: str, rival: Callable[[Bundle], Backend] | None, allow_unproven: bool
) -> tuple[Embedder | None, Row]:
    config, manifest = bundle.config, bundle.manifest
    # A rival's is the last word of its name; the reference is float32 whatever the graph is.
    precision = "fp32" if engine == REFERENCE else engine.split()[-1] if rival else manifest.precision
    row = Row(
        bundle=bundle.folder.name, bundle_id=bundle.id, model=f"{config.backbone} MGN {config.height}x{config.width}",
        precision=precision, mirror=manifest.flip, engine=engine, version="", device="", fused_heads=False, batch=0,
        images=0,
    )  # fmt: skip
    gc.collect()
    try:
        with PeakMemory() as peak:
            if rival:
                embedder = Embedder(rival(bundle), config, bundle)
            elif engine == REFERENCE:
                import torch

                torch.backends.cudnn.benchmark = True  # on a GPU cuDNN's fastest, as a careful user would have it
                embedder = Embedder.open_reference(bundle)
            else:
                embedder = Embedder.open(bundle, engine, allow_unproven=allow_unproven)
            embedder.backend(np.zeros((1, config.height, config.width, 3), np.uint8))
    except Exception as error:  # an engine's own: the other rows are worth having
        refused = isinstance(error, UserError)
        if refused and engine == REFERENCE:
            raise
        row.not_measured["engine"] = str(error) if refused else sentence(error)
        return None, row
    backend = embedder.backend
    row.version, row.device, row.fused_heads = backend.version, backend.device, backend.fused_heads
    row.host_bytes, row.device_bytes = peak.host, peak.device
    row.operations_per_image = operations(bundle)
    return embedder, row


def operations(bundle: Bundle) -> int | None:
    """Operations of the network for one image and, where it is averaged, its mirror, without computing them; a
    multiply-add is two. None without PyTorch."""
    if import_problem("torchvision", "train"):
        return None
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mgn_deploy.train.model import MGN, Embedding

    config = bundle.config
    with torch.device("meta"), torch.no_grad():
        embedding = Embedding(MGN(config).eval(), bundle.manifest.flip)
        with FlopCounterMode(display=False) as counted:
            embedding(torch.empty(1, config.height, config.width, 3, dtype=torch.uint8))
    return int(counted.get_total_flops())
