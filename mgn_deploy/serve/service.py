"""The service without HTTP: an engine behind its queue, a gallery, and what can be asked of them.

>>> with Service(Embedder.open("bundle"), store="store") as service:      # doctest: +SKIP
...     answer = service.embed([Upload("a.jpg", Path("a.jpg").read_bytes())])
...     hits = service.search(answer, k=10)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.identity.calibration import Calibration
from mgn_deploy.machine import usable_cpus
from mgn_deploy.serve.batching import BatchQueue
from mgn_deploy.serve.gallery import Gallery, Hit
from mgn_deploy.serve.limits import Limits
from mgn_deploy.serve.metrics import Metrics
from mgn_deploy.serve.people import PeopleList
from mgn_deploy.serve.uploads import Crop, Upload, check_count, decode


@dataclass(frozen=True)
class Answer:
    """Embedded crops.

    Attributes:
        crops: in the order of the uploads and their boxes, those with an error too; without their pixels.
        rows: float32 `[n, dim]` unit rows of the n crops without an error, in their order.
        seconds: what took how long: decode, queue, engine.
    """

    crops: list[Crop]
    rows: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)


class Service:
    """An engine for many callers, and a gallery. Any thread may call it; the engine runs on a thread of its own.

    Attributes:
        embedder: who embeds.
        gallery: the store that is searched; None without one.
        people: who is enrolled; None without a folder of them.
        calibration: the bundle's, which probabilities and thresholds need; None without one.
        metrics: what was done so far.
        ready: `warm_up` is through.

    Args:
        embedder: opened; nobody else may use it meanwhile.
        store: of the gallery, embedded by the same bundle.
        people: folder of enrolled people of the same bundle; made where there is none.
        limits: of requests and the queue.

    Raises:
        UserError: what `Gallery`, `People.create` and `Calibration.find` refuse.
    """

    def __init__(
        self,
        embedder: Embedder,
        store: str | os.PathLike[str] | None = None,
        people: str | os.PathLike[str] | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.embedder = embedder
        self.limits = limits or Limits()
        self.gallery = None if store is None else Gallery(store, embedder.bundle.id)
        self.people = None if people is None else PeopleList(people, embedder.bundle.id, embedder.dim)
        self.calibration = Calibration.find(embedder.bundle)
        self.metrics = Metrics()
        self.ready = False
        self.queue = BatchQueue(
            embedder.backend,
            embedder.dim,
            batch=self.limits.batch,
            wait_seconds=self.limits.wait_seconds,
            queued=self.limits.queued,
            on_batch=self.metrics.add_batch,
        )
        self.metrics.queued.set_function(lambda: self.queue.reserved)
        self.metrics.gallery.set_function(lambda: len(self.gallery.store) if self.gallery else 0)
        # Decoding lets go of the GIL. As many as there are cores: more would only hold more decoded images.
        self._decoders = ThreadPoolExecutor(usable_cpus(), thread_name_prefix="decode")
        self._decoding = threading.Semaphore(usable_cpus())

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what was taken, then end the threads."""
        self.queue.close()
        self._decoders.shutdown()

    def warm_up(self) -> None:
        """Run batches of several sizes: an engine's first call of a size is slow. Then the service is ready."""
        blank = np.zeros((self.embedder.height, self.embedder.width, 3), np.uint8)
        for size in sorted({2**power for power in range(self.queue.batch.bit_length())} | {self.queue.batch}):
            self.embed_crops([blank] * size)
        self.ready = True

    def embed(self, uploads: Sequence[Upload]) -> Answer:
        """Decode and embed.

        Raises:
            UserError: no image at all.
            TooLarge: more images or pixels than the limits.
            Overloaded, Closed: the queue has no room, or the service shuts down.
        """
        with self.queue.reserve(check_count(uploads, self.limits)):
            start = time.monotonic()
            # The only image of a request is decoded on its own thread: a hop to another one costs a tenth of a request.
            decoded = map(self._decode, uploads) if len(uploads) == 1 else self._decoders.map(self._decode, uploads)
            crops = [crop for several in decoded for crop in several]
            pixels = [crop.pixels for crop in crops if crop.pixels is not None]
            self.metrics.unreadable.inc(len(crops) - len(pixels))
            seconds = time.monotonic() - start
            embedded = self.queue.submit(pixels).result()
        return Answer(
            [Crop(crop.name, crop.box, None, crop.error) for crop in crops],
            embedded.rows,
            {"decode": seconds, "queue": embedded.queue_seconds, "engine": embedded.engine_seconds},
        )

    def _decode(self, upload: Upload) -> list[Crop]:
        with self._decoding:
            return decode(upload, self.embedder.height, self.embedder.width, self.limits)

    def embed_crops(self, crops: Sequence[np.ndarray]) -> Answer:
        """Embed crops that are decoded: uint8 `[height, width, 3]` each.

        Raises:
            Overloaded, Closed: the queue has no room, or the service shuts down.
        """
        with self.queue.reserve(len(crops)):
            embedded = self.queue.submit(list(crops)).result()
        return Answer(
            [Crop(str(index), None, None, None) for index in range(len(crops))],
            embedded.rows,
            {"queue": embedded.queue_seconds, "engine": embedded.engine_seconds},
        )

    def search(
        self,
        answer: Answer,
        k: int = 10,
        *,
        cameras: Sequence[int] | None = None,
        after: float | None = None,
        before: float | None = None,
    ) -> list[list[Hit]]:
        """The k nearest gallery images of each embedded crop: see `Gallery.search`.

        Raises:
            UserError: there is no gallery, it holds no image, or k is out of the limits.
        """
        gallery = self.require_gallery()
        if not 1 <= k <= self.limits.results:
            raise UserError(f"k must be 1 to {self.limits.results}, not {k}")
        gallery.refresh()
        if not len(answer.rows):
            return []
        return gallery.search(answer.rows, k, cameras=cameras, after=after, before=before)

    def require_gallery(self) -> Gallery:
        """The gallery; raises UserError where there is none."""
        if self.gallery is None:
            raise UserError("this service has no gallery: start it with --store")
        return self.gallery

    def require_people(self) -> PeopleList:
        """Who is enrolled; raises UserError without a folder of people."""
        if self.people is None:
            raise UserError("this service knows no people: start it with --people")
        return self.people
