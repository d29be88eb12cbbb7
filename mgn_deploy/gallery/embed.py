"""Images -> an embedding store: decoded while the engine runs, resumable, with every bad file named."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from mgn_deploy.choices import MAX_THREADS, Decoder, Dtype
from mgn_deploy.datasets.labels import LARGEST, Label, Labels, read_labels
from mgn_deploy.embedder import Embedder, check_batch_size
from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.gallery.inputs import open_source
from mgn_deploy.gallery.manifest import StoreManifest
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.relocate import follow_source
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.run import GalleryReport, Run
from mgn_deploy.gallery.sources import MOST_CROP_SIDE, Source
from mgn_deploy.gallery.tuning import AUTO, SIZES, choose_batch, choose_threads
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.images.decode import PREPROCESSING
from mgn_deploy.images.listing import ImageFile
from mgn_deploy.images.prefetch import decoding_threads
from mgn_deploy.progress import Progress

if TYPE_CHECKING:
    from mgn_deploy.gallery.on_device import DecoderProof
    from mgn_deploy.images.nvimagecodec import NvImageCodec

LOGGED_FAILURES = 10
TRACK = "track"  # the rule of --labels by which a track is a person
_log = logging.getLogger("mgn_deploy")


def embed_folder(
    folder: str | os.PathLike[str] | Source,
    store: str | os.PathLike[str],
    embedder: Embedder,
    *,
    batch_size: int | Literal["auto"] = 8,
    threads: int | Literal["auto"] | None = None,
    dtype: Dtype = "float32",
    labels: str | os.PathLike[str] | None = None,
    max_failures: int | None = None,
    verify_content: bool = False,
    profile: bool = False,
    decoder: Decoder = "pillow",
    progress: Progress | None = None,
) -> GalleryReport:
    """Embed every image of a folder or another source that `store` does not hold yet.

    An image is in the store already when its name, size and mtime are. Files that failed before are tried again. Rows
    are committed in shards and at least every `run.COMMIT_SECONDS`; on Ctrl-C, SIGTERM or SIGHUP what was embedded is
    committed before the exception goes on.

    Args:
        folder: searched recursively, in the order of the names' bytes; or a source, as `open_source` makes them.
        store: a new folder or the store of an earlier run over the same source with the same bundle and backend.
        embedder: decides the bundle, and is called with `batch_size` images at a time.
        batch_size: auto: the fastest by two seconds' trial on the first images (`tuning.choose_batch`). An engine may
            round differently at another one; the report has which it was.
        threads: that decode images; None: one more than CPUs; auto: the fastest by another two seconds' trial with the
            engine beside them (`tuning.choose_threads`).
        dtype: of the stored embeddings.
        labels: who is on an image: none, market1501, folder or a table, as in `datasets.labels.read_labels`; `track`: a
            box's track is its person; None: what the source says, as a list with a column identity does, or else
            nothing. Images that only the store has keep theirs, unless the rule says another; `folder` numbers all.
        max_failures: stop after more bad files than this; None: never.
        verify_content: read the files that are in the store already, and embed again those whose SHA-256 is another.
        profile: measure where the time goes; the report's `profile` has it.
        decoder: of photos; nvimagecodec's pixels are not Pillow's to the last bit: the store has another preprocessing
            id, and before anything is embedded the run's first images are compared (`on_device.prove_codec`).
        progress: called after each batch with the files done and to do.

    Raises:
        UserError: no such folder, no image in it, a store of something else, a store in use, a full disk; another
            decoder for a video.
        CannotRun: the decoder is not installed.
        GateFailed: more than `max_failures` bad files, or not one good one. What was embedded is committed. Or the
            decoder's pixels move embeddings too far.
    """
    if batch_size != AUTO:
        check_batch_size(batch_size)
    if threads is not None and threads != AUTO and not 1 <= threads <= MAX_THREADS:
        raise UserError(f"{threads} threads: give auto or a number from 1 to {MAX_THREADS}")
    source = folder if isinstance(folder, Source) else open_source(folder)
    measured = Profile()
    report = GalleryReport(skipped=source.skipped, proof=embedder.proof, profile=measured if profile else None)
    codec = None
    if decoder == "nvimagecodec":
        codec, report.decoder = _proven_codec(source, embedder)
        source = replace(source, codec=codec)

    def work(writer: StoreWriter, todo: list[ImageFile], rule: Labels) -> None:
        backend, tuning = embedder.backend, report.tuning
        if batch_size == AUTO:
            tuning["batch_size"] = choose_batch(backend, list(_first_crops(source, todo, embedder)))
        report.batch_size = tuning["batch_size"].chosen if batch_size == AUTO else int(batch_size)
        if threads == AUTO:
            first = partial(_first_crops, source, todo, embedder)
            tuning["threads"] = choose_threads(lambda count: first(threads=count), backend, report.batch_size)
        report.threads = tuning["threads"].chosen if threads == AUTO else int(threads or decoding_threads())
        measured.decoding_threads = report.threads
        images = replace(source, threads=report.threads).decode(todo, embedder.height, embedder.width, measured)
        with measured.stage("other"):
            run = Run(writer, embedder, report.batch_size, rule, report, max_failures, measured)
            run.embed(images, len(todo), progress)

    manifest = StoreManifest(
        bundle_id=embedder.bundle_id,
        backend=embedder.backend.name,
        preprocessing=codec.preprocessing if codec else PREPROCESSING,
        dim=embedder.dim,
        dtype=dtype,
        bundle_path=embedder.bundle_path,
        source=source.uri,
    )
    fill_store(source, store, manifest, work, report, labels, max_failures, verify_content)
    if codec and report.decoder:
        report.decoder.by_pillow = codec.by_pillow
        if codec.by_pillow:
            _log.warning(f"images that are no whole JPEG and were decoded by Pillow: {codec.by_pillow}")
    return report


def _proven_codec(source: Source, embedder: Embedder) -> tuple[NvImageCodec, DecoderProof]:
    from mgn_deploy.gallery.on_device import prove_codec
    from mgn_deploy.images.nvimagecodec import NvImageCodec

    if type(source).decode is not Source.decode:
        raise UserError(f"--decoder nvimagecodec is of photos, and {source.title} is a video: leave it out")
    codec = NvImageCodec()
    if codec.device == "cpu":
        _log.warning("no GPU is there: nvImageCodec decodes on the CPU, where it takes longer than Pillow")
    return codec, prove_codec(codec, source, embedder)


def fill_store(
    source: Source,
    store: str | os.PathLike[str],
    manifest: StoreManifest,
    work: Callable[[StoreWriter, list[ImageFile], Labels], None],
    report: GalleryReport,
    labels: str | os.PathLike[str] | None,
    max_failures: int | None,
    verify_content: bool,
) -> None:
    """Have what `store` does not hold yet embedded by `work`, which adds it to the store and the report.

    Args:
        source, store, labels, max_failures, verify_content: of `embed_folder`.
        manifest: what a new store gets and an older one must have.
        work: called with the store, the files to embed in the order of their rows, and the rule of their labels.
        report: of the run.

    Raises:
        UserError, GateFailed: as of `embed_folder`.
    """
    names = [file.name for file in source.files]
    rule = _labels(labels, source, names)
    rule.unlabelled(names)
    start = time.monotonic()
    follow_source(store, source.uri, names)
    with StoreWriter(store, manifest) as writer:
        if rule.kind == "folder":  # who is in the store alone is numbered, too
            rule = _labels(labels, source, [*names, *writer.known])
        labelled = sum((row.identity, row.camera) != (None, None) for row in writer.known.values())
        if labels == "none" and labelled:
            _log.warning(f"{labelled} images of the store keep the identity or camera that they have: --labels none")
        report.gone = len(writer.known.keys() - set(names)) if source.complete else 0
        # Files never seen come first, so that a run that was killed and is run again orders them as one that was not.
        fresh = [file for file in source.files if file.name not in writer.known]
        seen = [file for file in source.files if file.name in writer.known]
        before = [writer.known[file.name] for file in seen]
        digests = source.digests(seen) if verify_content else (row.sha256 for row in before)
        again = [
            file
            for file, row, digest in zip(seen, before, digests, strict=True)
            if row.error is not None or _what_was_embedded(row) != _what_was_embedded(file) or digest != row.sha256
        ]
        report.unchanged = len(seen) - len(again)
        changed = [file.name for file in again if writer.known[file.name].error is None]
        report.changed = len(changed)
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            _log.warning(
                f"{len(changed)} images have another size, date, box or content than in the store and are embedded "
                f"again: {', '.join(map(repr, changed[:5]))}{more}"
            )
        report.relabelled = _relabel(writer, rule, set(names))
        try:
            work(writer, fresh + again, rule)
        finally:
            report.seconds = time.monotonic() - start - sum(tuning.seconds for tuning in report.tuning.values())
            _log_losses(report, source.title)
    if max_failures is not None and len(report.failed) > max_failures:
        name, reason = report.failed[-1]
        raise GateFailed(f"more than {max_failures} images cannot be read; the last, {name!r}: {reason}")
    if report.failed and not report.embedded and not report.unchanged:
        name, reason = report.failed[0]
        raise GateFailed(
            f"not one of the {len(report.failed)} images of {source.title} could be read; the first, {name!r}: {reason}"
        )


def _labels(kind: str | os.PathLike[str] | None, source: Source, names: Sequence[str]) -> Labels:
    if kind is None:
        return source.labels or read_labels("none")
    if kind == TRACK:
        tracks = {file.name: Label(file.track, None) for file in source.files if file.track is not None}
        if not tracks:
            raise UserError(f"--labels {TRACK}: {source.title} has no tracks, which a tracker's --boxes would give")
        largest = max(label.identity for label in tracks.values())
        if largest > LARGEST:
            raise UserError(f"--labels {TRACK}: track {largest} is larger than {LARGEST}, a person's largest number")
        return Labels(TRACK, rule=tracks.get)
    return read_labels(kind, [*names, *source.whole])


def _first_crops(
    source: Source, files: list[ImageFile], embedder: Embedder, threads: int | None = None
) -> Iterator[np.ndarray]:
    """Those of the first files that can be read, enough for the largest batch that is tried."""
    images = replace(source, threads=threads).decode(files[: 2 * max(SIZES)], embedder.height, embedder.width)
    return islice((image.pixels for image in images if image.pixels is not None), max(SIZES))


def _log_losses(report: GalleryReport, title: str) -> None:
    for name, reason in report.failed[:LOGGED_FAILURES]:
        _log.warning(f"cannot be read: {name!r}: {reason}")
    if len(report.failed) > LOGGED_FAILURES:
        more = len(report.failed) - LOGGED_FAILURES
        _log.warning(f"... and {more} more, in the store's Parquet with their reasons")
    if report.unlike_crops:
        _log.warning(
            f"images wider than high or larger than {MOST_CROP_SIDE} pixels: {report.unlike_crops}; no crop of one "
            "person is so: give a detector's boxes (`embed --boxes`)"
        )
    if report.gone:
        _log.warning(
            f"{report.gone} images of the store are no longer in {title}; they stay until `mgn-deploy store prune`"
        )


def _what_was_embedded(image: Row | ImageFile) -> tuple[object, ...]:
    return image.size, image.mtime_ns, image.box, image.frame, image.track


def _relabel(writer: StoreWriter, rule: Labels, names: Collection[str]) -> int:
    """Give the rows that are in the store the labels of this run, where it has any rule; how many changed.

    Rows of other videos, lists or selections than `names`, of which the rule says nothing, keep theirs.
    """
    if rule.kind == "none":
        return 0
    changed = {}
    for name, row in writer.known.items():
        label = rule(name)
        identity, camera = label or (None, None)
        if (label or name in names) and (identity, camera) != (row.identity, row.camera):
            changed[name] = (identity, camera)
    if changed:
        writer.relabel(changed)
        _log.warning(f"{len(changed)} images of the store have another identity or camera by --labels {rule.kind} now")
    return len(changed)
