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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.choices import Dtype
from mgn_deploy.datasets.labels import Labels
from mgn_deploy.embedder import check_batch_size
from mgn_deploy.errors import UserError
from mgn_deploy.gallery import writer as writing
from mgn_deploy.gallery.cluster_connection import CLIENT, Cluster, connected, explained
from mgn_deploy.gallery.cluster_workers import Decoder, Engine, Part, Worker, Written, heard, resolved
from mgn_deploy.gallery.embed import fill_store
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.manifest import StoreManifest
from mgn_deploy.gallery.run import GalleryReport
from mgn_deploy.gallery.sources import Source
from mgn_deploy.gallery.writer import PARTS, StoreWriter
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.progress import Progress

_log = logging.getLogger("mgn_deploy")


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
    with connected(cluster.address), explained():
        if cluster.address.startswith(CLIENT):
            return _from_client(
                source, os.path.abspath(store), os.path.abspath(opened.folder), replace(cluster, address="auto"),
                backend=backend, allow_unproven=allow_unproven, batch_size=batch_size, dtype=dtype,
                labels=os.path.abspath(labels) if labels and os.path.isfile(labels) else labels,
                max_failures=max_failures, verify_content=verify_content,
            )  # fmt: skip
        engine = Engine(os.path.abspath(opened.folder), opened.id, backend, allow_unproven, batch_size)
        engine, device = resolved(engine)
        report.proof = opened.manifest.proof_in_words(engine.backend)
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
            decoder = Decoder(
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
        with heard() as said:
            return embed_on_cluster(*arguments, **options), said

    report, said = ray.get(ray.remote(there).options(num_cpus=0).remote())
    for level, sentence in said:
        _log.log(level, sentence)
    return report


def _parts(files: Sequence[ImageFile], room: int, rule: Labels) -> Iterator[Part]:
    """What fills the store's last shard, then whole ones."""
    start = number = 0
    while start < len(files):
        some = files[start : start + (room if start == 0 else writing.SHARD_ROWS)]
        yield Part(number, some, {file.name: rule(file.name) for file in some})
        start, number = start + len(some), number + 1


def _in_turn(written: Iterator[Written]) -> Iterator[Written]:
    """The parts in their order, as soon as those before are there."""
    waiting: dict[int, Written] = {}
    following = 0
    for part in written:
        waiting[part.number] = part
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _embedded(
    parts: list[Part],
    decoder: Decoder,
    engine: Engine,
    manifest: StoreManifest,
    folder: Path,
    cluster: Cluster,
    device: str,
) -> Iterator[Written]:
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
            Worker,
            fn_constructor_args=(engine, manifest, folder),
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=0,  # engines that hold the last CPUs of the nodes that are left would wait for decoders for ever
            num_gpus=None if device == "CPU" else 1,
        )
        .iter_rows()
    )
    yield from (row["written"] for row in rows)
