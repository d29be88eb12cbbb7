"""Images -> an embedding store by many machines, through Ray Data: CPUs decode for a pool of engines.

The images are divided where the store's shards begin. A part is decoded by one task and embedded by one engine, which
writes it as a shard into a folder that no other process knows (`STORE/parts/...`) and answers with its name. The one
process that holds the store's lock takes the shards in their order. So a part that is embedded twice, as its first
worker died or only seemed to, leaves a folder that nobody names.

Ray Data: https://docs.ray.io/en/latest/data/data.html
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.choices import Dtype
from mgn_deploy.datasets.labels import Label, Labels
from mgn_deploy.embedder import Embedder, check_batch_size
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.gallery import writer as writing
from mgn_deploy.gallery.embed import fill_store
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.manifest import ShardEntry, StoreManifest
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.run import GalleryReport, Run
from mgn_deploy.gallery.sources import Decoded, Source
from mgn_deploy.gallery.writer import PARTS, StoreWriter
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.machine import usable_cpus
from mgn_deploy.packages import require
from mgn_deploy.progress import Progress

LOCAL = "local"
CLIENT = "ray://"
TRIES = 20  # attempts at a part whose workers die
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to embed on.

    Attributes:
        address: `ray://HOST:PORT`, `auto` (the cluster that this machine is in), or `local` (one of this machine alone,
            which ends with the run).
        workers: the least and most engines; None: one, up to as many as the cluster has GPUs or, without any, nodes.
    """

    address: str
    workers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.address not in ("auto", LOCAL) and not self.address.startswith(CLIENT):
            raise UserError(f"--cluster {self.address}: give ray://HOST:PORT, auto or local")
        if self.workers is not None and not 1 <= self.workers[0] <= self.workers[1]:
            raise UserError(f"{self.workers[0]} to {self.workers[1]} workers: give the least, 1 or more, and the most")


@dataclass(frozen=True)
class _Part:
    number: int
    files: Sequence[ImageFile]
    labels: dict[str, Label | None]


@dataclass(frozen=True)
class _Written:
    """A part's shard, how many of its images are unlike crops, and what the library logged on the way."""

    number: int
    folder: Path
    shard: ShardEntry
    unlike_crops: int
    said: list[tuple[int, str]]


def embed_on_cluster(
    folder: str | os.PathLike[str] | Source,
    store: str | os.PathLike[str],
    bundle: Bundle | str | os.PathLike[str],
    cluster: Cluster,
    *,
    backend: str = "auto",
    allow_unproven: bool = False,
    batch_size: int = 8,
    dtype: Dtype = "float32",
    labels: str | os.PathLike[str] | None = None,
    max_failures: int | None = None,
    verify_content: bool = False,
    progress: Progress | None = None,
) -> GalleryReport:
    """Embed on a Ray cluster what `store` does not hold yet: the bytes that `embed_folder` writes.

    Images, bundle and store are read and written by every node under the same paths. All engines are of the name that
    the first worker opens. A worker or node that dies loses what it was embedding, which another one does again.

    Args:
        folder, store, batch_size, dtype, labels, max_failures, verify_content, progress: as of `embed_folder`.
        bundle: its folder, which the nodes find under the same path.
        cluster: where to.
        backend, allow_unproven: as of `Embedder.open`, on the workers.

    Raises:
        UserError: as of `embed_folder`; no such cluster; objects in this process's memory; a node that finds another
            bundle or store under its path; a part whose worker died `TRIES` times.
        CannotRun: Ray is not installed, or a worker cannot open the engine.
        GateFailed: as of `embed_folder`.
    """
    check_batch_size(batch_size)
    source = folder if isinstance(folder, Source) else open_source(folder)
    if source.uri.startswith("memory:"):
        raise UserError(f"{source.uri} is memory of this process, which no node of a cluster reads: embed it here")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    report = GalleryReport(skipped=source.skipped, batch_size=batch_size, threads=1)
    with _connected(cluster.address), _explained():
        if cluster.address.startswith(CLIENT):
            return _from_client(
                source, os.path.abspath(store), os.path.abspath(opened.folder), replace(cluster, address="auto"),
                backend=backend, allow_unproven=allow_unproven, batch_size=batch_size, dtype=dtype,
                labels=os.path.abspath(labels) if labels and os.path.isfile(labels) else labels,
                max_failures=max_failures, verify_content=verify_content,
            )  # fmt: skip
        engine = _Engine(os.path.abspath(opened.folder), opened.id, backend, allow_unproven, batch_size)
        engine, device = _resolved(engine)
        manifest = StoreManifest(
            bundle_id=opened.id,
            backend=engine.backend,
            preprocessing=PREPROCESSING,
            dim=opened.config.dim,
            dtype=dtype,
            bundle_path=engine.bundle,
            source=source.uri,
        )

        def work(writer: StoreWriter, todo: list[ImageFile], rule: Labels) -> None:
            parts = list(_parts(todo, writer.room, rule))
            folder = writer.folder.absolute() / PARTS
            folder.mkdir()
            decoder = _Decoder(
                replace(source, files=[], labels=None, whole=(), threads=1),
                opened.config.height,
                opened.config.width,
                folder,
            )
            warned = Counter[str]()
            try:
                done = 0
                for written in _in_turn(_embedded(parts, decoder, engine, writer.manifest, folder, cluster, device)):
                    rows = writer.take(written.folder, written.shard)
                    shutil.rmtree(written.folder, ignore_errors=True)
                    failed = [(row.name, row.error) for row in rows if row.error is not None]
                    report.failed += failed
                    report.embedded += len(rows) - len(failed)
                    report.unlike_crops += written.unlike_crops
                    warned.update(sentence for level, sentence in written.said if level >= logging.WARNING)
                    done += len(rows)
                    if progress:
                        progress("embedding", done, len(todo))
                    if max_failures is not None and len(report.failed) > max_failures:
                        break
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                for sentence, count in warned.items():
                    _log.warning(f"{sentence} (by workers of the cluster; how often: {count})")

        fill_store(source, store, manifest, work, report, labels, max_failures, verify_content)
    return report


def _from_client(*arguments: Any, **options: Any) -> GalleryReport:
    """`embed_on_cluster` as a task of the cluster: Ray's client runs no streaming actors, which Ray Data's are."""
    import ray

    def there() -> tuple[GalleryReport, list[tuple[int, str]]]:
        _log.setLevel(logging.INFO)
        with _heard() as said:
            return embed_on_cluster(*arguments, **options), said

    report, said = ray.get(ray.remote(there).options(num_cpus=0).remote())
    for level, sentence in said:
        _log.log(level, sentence)
    return report


@contextmanager
def _heard() -> Iterator[list[tuple[int, str]]]:
    """Level and sentence of what the library logs meanwhile: on a worker nobody reads it."""
    said: list[tuple[int, str]] = []
    keeper = logging.Handler()
    keeper.emit = lambda record: said.append((record.levelno, record.getMessage()))  # type: ignore[method-assign]
    _log.addHandler(keeper)
    try:
        yield said
    finally:
        _log.removeHandler(keeper)


def _parts(files: Sequence[ImageFile], room: int, rule: Labels) -> Iterator[_Part]:
    """What fills the store's last shard, then whole ones."""
    start = number = 0
    while start < len(files):
        some = files[start : start + (room if start == 0 else writing.SHARD_ROWS)]
        yield _Part(number, some, {file.name: rule(file.name) for file in some})
        start, number = start + len(some), number + 1


def _in_turn(written: Iterator[_Written]) -> Iterator[_Written]:
    """The parts in their order, as soon as those before are there."""
    waiting: dict[int, _Written] = {}
    following = 0
    for part in written:
        waiting[part.number] = part
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _embedded(
    parts: list[_Part],
    decoder: _Decoder,
    engine: _Engine,
    manifest: StoreManifest,
    folder: Path,
    cluster: Cluster,
    device: str,
) -> Iterator[_Written]:
    """The parts, in the order in which the cluster ends them."""
    import ray

    if not parts:
        return
    gpus = int(ray.cluster_resources().get("GPU", 0))
    nodes = sum(node["Alive"] for node in ray.nodes())
    least, most = cluster.workers or (1, nodes if device == "CPU" else gpus)
    least, most = min(least, len(parts)), min(most, len(parts))
    _log.info(f"{engine.backend} ({device}) on {least} to {most} workers of {cluster.address}, {len(parts)} parts")
    rows = (
        ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        .map(decoder, num_cpus=1)
        .map(
            _Worker,
            fn_constructor_args=(engine, manifest, folder),
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=0,  # engines that hold the last CPUs of the nodes that are left would wait for decoders for ever
            num_gpus=None if device == "CPU" else 1,
        )
        .iter_rows()
    )
    yield from (row["written"] for row in rows)


@dataclass(frozen=True)
class _Engine:
    """How every worker opens the engine."""

    bundle: str
    bundle_id: str
    backend: str
    allow_unproven: bool
    batch_size: int

    def open(self) -> Embedder:
        embedder = Embedder.open(self.bundle, self.backend, allow_unproven=self.allow_unproven)
        if embedder.bundle_id != self.bundle_id:
            raise UserError(
                f"{self.bundle} of {os.uname().nodename} is bundle {embedder.bundle_id[:12]}, not "
                f"{self.bundle_id[:12]}: give a folder that is the same on all nodes"
            )
        return embedder


def _resolved(engine: _Engine) -> tuple[_Engine, str]:
    """The engine by the name that a first worker opens it with, and the device that it runs on."""
    import ray

    def look() -> tuple[str, str]:
        backend = engine.open().backend
        return backend.name, backend.device

    gpu = 1 if ray.cluster_resources().get("GPU") else 0
    name, device = ray.get(ray.remote(look).options(num_cpus=1, num_gpus=gpu).remote())
    return replace(engine, backend=name), device


@dataclass(frozen=True)
class _Decoder:
    """Decodes parts, on the CPUs of the cluster."""

    source: Source
    height: int
    width: int
    folder: Path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        _attempt(self.folder, row["part"], "decode")
        with _heard() as said:
            images = list(self.source.decode(row["part"].files, self.height, self.width))
        return {"part": row["part"], "images": images, "said": said}


class _Worker:
    """Embeds decoded parts by an engine of its own, opened for the first one, and writes them."""

    def __init__(self, engine: _Engine, manifest: StoreManifest, folder: Path) -> None:
        self._engine, self._manifest, self._folder = engine, manifest, folder
        self._embedder: Embedder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part: _Part = row["part"]
        images: list[Decoded] = row["images"]
        manifest, report = self._manifest.model_copy(update={"shards": ()}), GalleryReport()
        with _heard() as said, StoreWriter(_attempt(self._folder, part, "embed"), manifest) as writer:
            if self._embedder is None:
                self._embedder = self._engine.open()
            run = Run(writer, self._embedder, self._engine.batch_size, part.labels.get, report, None, Profile())
            run.embed(iter(images), len(images), None)
        shard = writer.manifest.shards[0]
        return {"written": _Written(part.number, writer.folder, shard, report.unlike_crops, row["said"] + said)}


def _attempt(folder: Path, part: _Part, step: str) -> Path:
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


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray, connected to the cluster; a program that is connected already stays so."""
    require("ray.data", "ray", "--cluster embeds through Ray Data")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what went wrong is raised
    import ray

    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mgn-ray-", ignore_cleanup_errors=True) as folder:
        try:
            if address == LOCAL:
                # Only this machine reaches its ports: whoever does may run programs.
                ray.init(
                    LOCAL, num_cpus=usable_cpus(), include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, _node_ip_address="127.0.0.1", _temp_dir=folder,
                )  # fmt: skip
            else:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"--cluster {address}: no Ray cluster answers there ({error})") from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _explained() -> Iterator[None]:
    """What is raised on a worker, as it would be here; Ray Data says nothing on the way."""
    import ray

    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ray.exceptions.RayError as error:
        raised: BaseException | None = error
        while raised is not None:
            if isinstance(raised, (UserError, CannotRun)):
                raise raised from None
            raised = getattr(raised, "cause", None) or raised.__cause__
        last = str(error).strip().splitlines()[-1]  # of the worker's trace: Ray keeps no cause of what a map raises
        raise UserError(f"the cluster ended the run, and the same command goes on from there: {last}") from error
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
