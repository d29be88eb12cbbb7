"""Where the time of an `embed` run goes, and what to change."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

LoopStage = Literal["wait for images", "decode video", "infer", "write", "other"]
ThreadStage = Literal["read", "decode", "resize"]
LOOP_STAGES: tuple[LoopStage, ...] = ("wait for images", "decode video", "infer", "write", "other")
THREAD_STAGES: tuple[ThreadStage, ...] = ("read", "decode", "resize")
WAIT_FOR_ENGINE = "wait for the engine"
T = TypeVar("T")

_ADVICE = {
    "infer": "the engine is the bottleneck: a bundle in INT8 or FP16, a faster --backend or device, or another "
    "--batch (auto tries several) makes it faster",
    "read": "reading is the bottleneck: a disk or network that is faster or nearer, or tar shards in place of many "
    "small files, makes it faster",
    "decode": "decoding is the bottleneck: more cores, or smaller images (crops in place of photos, JPEG in place of "
    "PNG) make it faster",
    "resize": "resizing is the bottleneck: more cores, or crops that are stored in the network's size, make it faster",
    "decode video": "decoding the video is the bottleneck: one in H.264 or of fewer pixels, or a part of it in each of "
    "several runs, is faster",
    "write": "writing the store is the bottleneck: a faster disk or --dtype float16 makes it faster",
    "other": "neither the engine nor the images: a larger --batch has less to do around each call",
}


class Profile:
    """Counts the seconds of a run's main loop, which are exclusive, and of the threads that decode beside it.

    The main loop is in one stage at any time, so that its stages add up to its wall time.

    Attributes:
        decoding_threads: how many threads decode.
    """

    def __init__(self) -> None:
        self._loop: dict[str, float] = defaultdict(float)
        self._threads: dict[str, float] = defaultdict(float)
        self.decoding_threads = 1
        self._lock = threading.Lock()
        self._stage: LoopStage | None = None
        self._since = 0.0

    @contextmanager
    def stage(self, stage: LoopStage) -> Iterator[None]:
        """Count what the main loop does inside as this stage, but for stages within it."""
        outer = self._stage
        self._enter(stage)
        try:
            yield
        finally:
            self._enter(outer)

    def each(self, stage: LoopStage, items: Iterable[T]) -> Iterator[T]:
        """Items whose making, on the main loop's thread, counts as this stage."""
        iterator = iter(items)
        while True:
            with self.stage(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def on_thread(self, stage: ThreadStage) -> Iterator[None]:
        """Count what a decoding thread does inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self._threads[stage] += seconds

    def _enter(self, stage: LoopStage | None) -> None:
        now = time.perf_counter()
        if self._stage is not None:
            self._loop[self._stage] += now - self._since
        self._stage, self._since = stage, now

    @property
    def seconds(self) -> float:
        """Of the main loop."""
        return sum(self._loop.values())

    def loop(self) -> dict[str, float]:
        """Seconds of the main loop by stage."""
        return {stage: self._loop[stage] for stage in LOOP_STAGES}

    def threads(self) -> dict[str, float]:
        """Seconds of all decoding threads together by stage; what they did not work they waited for the engine."""
        busy: dict[str, float] = {stage: self._threads[stage] for stage in THREAD_STAGES}
        return {**busy, WAIT_FOR_ENGINE: max(0.0, self.decoding_threads * self.seconds - sum(busy.values()))}

    @property
    def bottleneck(self) -> str:
        """The stage that costs most: of the main loop or, where that waits for images, of the threads."""
        loop = self.loop()
        longest = max(loop, key=loop.__getitem__)
        if longest != "wait for images":
            return longest
        return max(THREAD_STAGES, key=lambda stage: self._threads[stage])

    @property
    def advice(self) -> str:
        """One sentence: what to change."""
        loop = self.loop()
        infer, waiting = (loop[stage] / self.seconds if self.seconds else 0.0 for stage in ("infer", "wait for images"))
        return (
            f"{_ADVICE[self.bottleneck]} (the engine works {infer:.0%} of the time, and waits for images {waiting:.0%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `loop` and `threads` with seconds and share of each stage; shares of each add up to 1."""
        return {
            "seconds": round(self.seconds, 3),
            "decoding_threads": self.decoding_threads,
            "loop": _shares(self.loop()),
            "threads": _shares(self.threads()),
            "bottleneck": self.bottleneck,
            "advice": self.advice,
        }


def _shares(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    total = sum(seconds.values()) or 1.0
    return {stage: {"seconds": round(value, 3), "share": round(value / total, 4)} for stage, value in seconds.items()}
