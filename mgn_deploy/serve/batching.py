"""Crops of many callers into full calls of one engine, on one thread.

A caller first reserves room for its images, so that what is being decoded counts, too; then it hands in the crops and
gets a future. The engine's thread takes a batch once it is full, or once its first crop has waited long enough. While
a batch runs, the next one fills.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mgn_deploy.backends.base import Backend

_RATE_MEMORY = 0.8  # weight of the past in the running mean of the engine's rate


class Overloaded(Exception):
    """The queue is full. `retry_after` is in how many seconds it should have room, a whole number from 1 on."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The service is shutting down, and takes nothing more."""


class Embedded(NamedTuple):
    """The answer to one request's crops.

    Attributes:
        rows: float32 `[n, dim]`, unit rows.
        queue_seconds: from handing in to the start of the first engine call.
        engine_seconds: of the engine calls that had a crop of it.
    """

    rows: np.ndarray
    queue_seconds: float
    engine_seconds: float


class BatchReport(NamedTuple):
    """One engine call: its images, how long it took, and how long each of its images had waited."""

    images: int
    seconds: float
    waited: tuple[float, ...]


@dataclass
class _Request:
    crops: Sequence[np.ndarray]
    rows: np.ndarray
    handed_in: float
    future: Future[Embedded] = field(default_factory=Future)
    taken: int = 0  # crops that are in a batch
    done: int = 0
    started: float = 0.0
    engine_seconds: float = 0.0


class _Share(NamedTuple):
    """The crops of one request that go into one batch."""

    request: _Request
    start: int
    stop: int


class BatchQueue:
    """The bounded queue and the thread that calls the engine. Any thread may use it.

    Args:
        backend: called from this queue's thread alone.
        dim: of an embedding.
        batch: most crops a call; the backend's own limit where that is lower.
        wait_seconds: how long a batch that is not full waits for more.
        queued: most crops that were reserved and are not answered.
        on_batch: called on the engine's thread after each call.
    """

    def __init__(
        self,
        backend: Backend,
        dim: int,
        *,
        batch: int = 8,
        wait_seconds: float = 0.005,
        queued: int = 256,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        self.batch = min(batch, backend.batch_limits.max) if backend.batch_limits else batch
        self._backend, self._dim = backend, dim
        self._wait_seconds, self._queued, self._on_batch = wait_seconds, queued, on_batch
        self._reserved = 0
        self._rate = 0.0  # images/s of the engine
        self._waiting = deque[_Request]()  # those with crops that are in no batch
        self._crops = 0  # such crops
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def reserved(self) -> int:
        """Images that were taken and are not answered."""
        return self._reserved

    @contextmanager
    def reserve(self, images: int) -> Iterator[None]:
        """Keep room for a request's images until it is answered.

        Raises:
            Overloaded: there is no room.
            Closed: the queue is shutting down.
        """
        with self._changed:
            if self._closing:
                raise Closed("the service is shutting down")
            if self._reserved + images > self._queued:
                seconds = self._reserved / self._rate if self._rate else 1.0
                raise Overloaded(max(1, math.ceil(seconds)))
            self._reserved += images
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= images
                self._changed.notify_all()

    def submit(self, crops: Sequence[np.ndarray]) -> Future[Embedded]:
        """Hand in crops, uint8 `[height, width, 3]` each, inside of `reserve`. The future fails as the engine does."""
        request = _Request(crops, np.empty((len(crops), self._dim), np.float32), time.monotonic())
        if not crops:
            request.future.set_result(Embedded(request.rows, 0.0, 0.0))
            return request.future
        with self._changed:
            self._waiting.append(request)
            self._crops += len(crops)
            self._changed.notify_all()
        return request.future

    def close(self) -> None:
        """Take nothing more, answer what was taken, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while shares := self._next_batch():
            in_flight = deque[list[_Share]]()
            try:
                start = time.monotonic()
                for rows in self._backend.stream(self._batches(shares, in_flight)):
                    now = time.monotonic()
                    self._deliver(in_flight.popleft(), rows, now - start)
                    start = now
            except Exception as error:  # of one call: its callers are told, the next call may do
                for share in (share for batch in in_flight for share in batch):
                    if not share.request.future.done():
                        share.request.future.set_exception(error)

    def _next_batch(self) -> list[_Share]:
        """Wait for a batch; empty once the queue is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or (self._closing and not self._reserved))
            if not self._waiting:
                return []
            until = self._waiting[0].handed_in + self._wait_seconds
            self._changed.wait_for(lambda: self._crops >= self.batch, max(0.0, until - time.monotonic()))
            return self._take()

    def _take(self) -> list[_Share]:
        shares, room = [], self.batch
        while room and self._waiting:
            request = self._waiting[0]
            start = request.taken
            request.taken = min(len(request.crops), start + room)
            shares.append(_Share(request, start, request.taken))
            room -= request.taken - start
            self._crops -= request.taken - start
            if request.taken == len(request.crops):
                self._waiting.popleft()
        return shares

    def _batches(self, shares: list[_Share], in_flight: deque[list[_Share]]) -> Iterator[np.ndarray]:
        """The first batch, and more while full ones wait: a backend on a GPU asks for them ahead of its results."""
        while shares:
            in_flight.append(shares)
            started = time.monotonic()
            for share in shares:
                share.request.started = share.request.started or started
            yield np.stack([crop for share in shares for crop in share.request.crops[share.start : share.stop]])
            with self._changed:
                shares = self._take() if self._crops >= self.batch else []

    def _deliver(self, shares: list[_Share], rows: np.ndarray, seconds: float) -> None:
        waited, offset = [], 0
        for request, start, stop in shares:
            request.rows[start:stop] = rows[offset : offset + stop - start]
            offset += stop - start
            request.done += stop - start
            request.engine_seconds += seconds
            queue_seconds = request.started - request.handed_in
            waited += [queue_seconds] * (stop - start)
            if request.done == len(request.crops) and not request.future.done():
                request.future.set_result(Embedded(request.rows, queue_seconds, request.engine_seconds))
        rate = len(rows) / max(seconds, 1e-9)
        self._rate = _RATE_MEMORY * self._rate + (1 - _RATE_MEMORY) * rate if self._rate else rate
        if self._on_batch:
            self._on_batch(BatchReport(len(rows), seconds, tuple(waited)))
