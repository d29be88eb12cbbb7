"""One run of `embed`: its loop, which commits what is embedded, and its report."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mgn_deploy.embedder import Embedder
from mgn_deploy.gallery.profile import Profile
from mgn_deploy.gallery.row import Row
from mgn_deploy.gallery.sources import Decoded
from mgn_deploy.gallery.tuning import Tuning
from mgn_deploy.gallery.writer import StoreWriter
from mgn_deploy.interrupt import DeferredInterrupt, Stopped
from mgn_deploy.progress import Progress

if TYPE_CHECKING:
    from mgn_deploy.gallery.on_device import DecoderProof

COMMIT_SECONDS = 30.0  # at most so much work is lost by a power cut


@dataclass
class GalleryReport:
    """What one run did.

    Attributes:
        embedded: images that it embedded.
        unchanged: images that were in the store already.
        changed: images that differ from what the store knows (size, date, box, content) and are embedded again.
        gone: images of the store that are no longer in the source; their rows stay until `store prune`.
        failed: name and reason of each file that it could not read.
        skipped: files that are no image, by extension.
        relabelled: images that were in the store with another identity or camera, and have the new one.
        unlike_crops: images that were embedded whole and are wider than high or larger than any crop of a person.
        batch_size: images an engine call.
        threads: that decoded them; on a cluster those of one task.
        tuning: how `batch_size` and `threads` were chosen, where they were auto.
        proof: how far the engine was found from PyTorch, or that nobody looked.
        seconds: how long it took, without the trials of `tuning`.
        profile: where the time went, where that was asked for.
        decoder: of another decoder than Pillow, and its proof.
    """

    embedded: int = 0
    unchanged: int = 0
    changed: int = 0
    gone: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    relabelled: int = 0
    unlike_crops: int = 0
    batch_size: int = 0
    threads: int = 0
    tuning: dict[str, Tuning] = field(default_factory=dict)
    proof: str = ""
    seconds: float = 0.0
    profile: Profile | None = None
    decoder: DecoderProof | None = None

    @property
    def images_per_second(self) -> float:
        return self.embedded / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; of the files that failed their number; `tuning` and `profile` where they were
        asked for."""
        values = {
            **vars(self),
            "failed": len(self.failed),
            "skipped": dict(self.skipped),
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 2),
        }
        del values["tuning"], values["profile"], values["decoder"]
        if self.tuning:
            values["tuning"] = {name: tuning.to_dict() for name, tuning in self.tuning.items()}
        if self.profile is not None:
            values["profile"] = self.profile.to_dict()
        if self.decoder is not None:
            values["decoder"] = asdict(self.decoder)
        return values


@dataclass
class Run:
    """The rows of one run and their embeddings, while a backend that may ask for batches ahead makes them."""

    writer: StoreWriter
    embedder: Embedder
    batch_size: int
    labels: Callable[[str], Any]
    report: GalleryReport
    max_failures: int | None
    profile: Profile
    _rows: list[Row] = field(default_factory=list)  # that are not committed yet
    _embeddings: list[np.ndarray | None] = field(default_factory=list)  # theirs, where they are made
    _done: int = 0  # rows that are committed
    _crops: list[np.ndarray] = field(default_factory=list)  # of the batch that is being filled
    _filling: list[int] = field(default_factory=list)  # their rows, counted from the run's first
    _in_flight: deque[list[int]] = field(default_factory=deque)  # rows of each batch that the backend has

    def embed(self, images: Iterator[Decoded], total: int, progress: Progress | None) -> None:
        """Embed and commit `total` images."""
        committed = time.monotonic()
        each = self.profile.each
        try:
            batches = each("other", self._batches(each("wait for images", images)))
            for embeddings in each("infer", self.embedder.backend.stream(batches)):
                self.report.embedded += self._add(embeddings)
                if progress:
                    progress("embedding", self._complete(), total)
                while self._complete() - self._done >= self.writer.room:
                    self._commit(self.writer.room)
                    committed = time.monotonic()
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
        finally:
            self._commit()
        if progress:
            progress("embedding", self._done, total)

    def _batches(self, images: Iterable[Decoded]) -> Iterator[np.ndarray]:
        """The crops of `images` in batches `[batch_size, height, width, 3]`; each image becomes a row."""
        for image in images:
            self._rows.append(self._row(image))
            self._embeddings.append(None)
            if image.pixels is not None:
                self._crops.append(image.pixels)
                self._filling.append(self._done + len(self._rows) - 1)
            if len(self._crops) == self.batch_size:
                yield self._full_batch()
            if self.max_failures is not None and len(self.report.failed) > self.max_failures:
                break
        if self._crops:
            yield self._full_batch()

    def _row(self, image: Decoded) -> Row:
        file = image.file
        if image.error is not None:
            self.report.failed.append((file.name, image.error))
        self.report.unlike_crops += image.unlike_crop
        identity, camera = self.labels(file.name) or (None, None)
        return Row(
            file.name, file.size, file.mtime_ns, image.error, identity, camera, image.sha256,
            file.frame, file.time_s, file.track, file.box,
        )  # fmt: skip

    def _full_batch(self) -> np.ndarray:
        # An engine may round differently at another batch size, and a resumed run must not: copies fill the last batch.
        crops = self._crops + [self._crops[-1]] * (self.batch_size - len(self._crops))
        batch = np.stack(crops, out=self.embedder.backend.buffer(len(crops), *crops[0].shape[:2]))
        self._in_flight.append(self._filling)
        self._filling = []
        self._crops.clear()
        return batch

    def _add(self, embeddings: np.ndarray) -> int:
        """Take the embeddings of the earliest batch that the backend has; how many rows they are."""
        rows = self._in_flight[0]
        for row, embedding in zip(rows, embeddings, strict=False):
            self._embeddings[row - self._done] = embedding
        self._in_flight.popleft()  # now: Ctrl-C between the two must not count rows that are not there
        return len(rows)

    def _complete(self) -> int:
        """How many rows, from the run's first on, are embedded or failed."""
        waiting = [rows[0] for rows in (*self._in_flight, self._filling) if rows]
        return min(waiting, default=self._done + len(self._rows))

    def _commit(self, most: int | None = None) -> None:
        """Commit the complete rows that say something new: a file that fails as before is in the store already."""
        count = min(self._complete() - self._done, most or len(self._rows))
        nan = np.full(self.embedder.dim, np.nan, np.float32)
        known = self.writer.known
        new = [index for index, row in enumerate(self._rows[:count]) if row.error is None or row != known.get(row.name)]
        with self.profile.stage("write"), DeferredInterrupt() as interrupt:
            if new:
                made = (self._embeddings[index] for index in new)
                array = np.stack([nan if embedding is None else embedding for embedding in made])
                self.writer.add([self._rows[index] for index in new], array)
            self._done += count
            del self._rows[:count], self._embeddings[:count]
        if interrupt.wanted:
            raise Stopped(interrupt.wanted)
