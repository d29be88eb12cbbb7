"""Images a call and decoding threads by which a run is fastest, each tried in two seconds before it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final

import numpy as np

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.images.prefetch import batched, decoding_threads
from mgn_deploy.machine import usable_cpus

AUTO: Final = "auto"
SIZES = (1, 2, 4, 8, 16, 32)
SECONDS = 2.0  # for all of them together; the smallest is tried in any case
ROUNDS = 2  # the better one counts: noise only ever slows down
TOLERANCE = 0.03  # a rate within this share of the best is as good: a smaller batch has less memory and latency
DEFAULT = 8  # where there is no image to try with
_log = logging.getLogger("mgn_deploy")


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and why.

    Attributes:
        chosen: the number of images an engine call, or of threads.
        images_per_second: of each number that was tried.
        seconds: that trying took.
    """

    chosen: int
    images_per_second: dict[int, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rates = {str(size): round(rate, 2) for size, rate in self.images_per_second.items()}
        return {"chosen": self.chosen, "images_per_second": rates, "seconds": round(self.seconds, 3)}


def choose_batch(backend: Backend, crops: Sequence[np.ndarray]) -> Tuning:
    """Try the sizes that the engine takes and choose the smallest that is within `TOLERANCE` of the fastest.

    Sizes are tried from small to large, each after a call that is not counted. One whose calls would not fit in what is
    left of the time is left out, with those above it: an engine that takes a second an image is tried with few sizes.

    Args:
        backend: an opened engine.
        crops: uint8 `[height, width, 3]`, repeated to fill batches; without any the answer is `DEFAULT`.
    """
    sizes = candidates(backend.batch_limits)
    if not crops:
        return Tuning(min(sizes, key=lambda size: abs(size - DEFAULT)), {}, 0.0)
    start = time.perf_counter()
    rates: dict[int, float] = {}
    for size in sizes * ROUNDS:
        # As long as the last call of the next smaller size lets expect: one that is not counted, and one that is.
        expected = 2 * size / rates.get(size, rates[max(rates)]) if rates else 0.0
        if time.perf_counter() - start + expected > SECONDS:
            continue
        if size not in rates:
            _rate(backend, crops, size, 0.0)
        rates[size] = max(rates.get(size, 0.0), _rate(backend, crops, size, SECONDS / len(sizes) / ROUNDS / 2))
    tuning = Tuning(smallest_of_the_best(rates), rates, time.perf_counter() - start)
    tried = ", ".join(f"{rate:.1f} at {size}" for size, rate in rates.items())
    _log.info(
        f"--batch auto chose {tuning.chosen} (images/s: {tried}); an engine may round differently at another one: "
        f"give --batch {tuning.chosen} where the store has to come out the same again"
    )
    return tuning


def choose_threads(decode: Callable[[int], Iterator[np.ndarray]], backend: Backend, batch_size: int) -> Tuning:
    """Try numbers of decoding threads, with the engine beside them, and choose the smallest that is within `TOLERANCE`
    of the fastest.

    Args:
        decode: the same first images of the run, by so many threads: uint8 `[height, width, 3]`.
        backend: an opened engine.
        batch_size: images a call of it.
    """
    start = time.perf_counter()
    rates: dict[int, float] = {}
    if any(True for _ in decode(decoding_threads())):  # files are in the cache from here on, as for all that follow
        for threads in sorted({1, usable_cpus(), decoding_threads(), 2 * usable_cpus(), 4 * usable_cpus()}) * ROUNDS:
            began = time.perf_counter()
            if rates and began - start > SECONDS:
                break
            batches = (np.stack(batch) for batch in batched(decode(threads), batch_size))
            embedded = sum(len(rows) for rows in backend.stream(batches))
            rates[threads] = max(rates.get(threads, 0.0), embedded / (time.perf_counter() - began))
    chosen = smallest_of_the_best(rates) if rates else decoding_threads()
    tuning = Tuning(chosen, rates, time.perf_counter() - start)
    tried = ", ".join(f"{rate:.1f} by {count}" for count, rate in rates.items())
    _log.info(f"--threads auto chose {tuning.chosen} (images/s: {tried})")
    return tuning


def candidates(limits: BatchLimits | None) -> tuple[int, ...]:
    """The sizes that an engine was compiled for; at least one."""
    if limits is None:
        return SIZES
    return tuple(size for size in SIZES if limits.min <= size <= limits.max) or (limits.opt,)


def smallest_of_the_best(rates: dict[int, float]) -> int:
    """The smallest size whose images a second are within `TOLERANCE` of the most."""
    enough = (1 - TOLERANCE) * max(rates.values())
    return min(size for size, rate in rates.items() if rate >= enough)


def _rate(backend: Backend, crops: Sequence[np.ndarray], size: int, seconds: float) -> float:
    """Images a second of a stream of full batches that takes about so long; at least one batch."""
    images = cycle(crops)
    start = time.perf_counter()

    def batches() -> Iterator[np.ndarray]:
        while True:
            batch = list(islice(images, size))
            yield np.stack(batch, out=backend.buffer(size, *batch[0].shape[:2]))
            if time.perf_counter() - start >= seconds:
                return

    embedded = sum(len(rows) for rows in backend.stream(batches()))
    return embedded / (time.perf_counter() - start)
