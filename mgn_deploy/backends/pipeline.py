"""Batches through sets of buffers that take turns, for engines on a GPU.

    upload    pinned -> GPU     batch 3 |         batch 4 |
    compute                     batch 2     | batch 3     |
    download  GPU -> pinned      | batch 1  |  | batch 2  |

One set is on its way, one is being filled, one is in reserve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from mgn_deploy.cuda.buffers import split_batch

SLOTS = 3


class Slot(Protocol):
    """Pinned memory for one batch on its way: uint8 `[most, height, width, 3]` and float32 `[most, dim]`."""

    images: np.ndarray
    embeddings: np.ndarray


SlotT = TypeVar("SlotT", bound=Slot)
# Of a batch on its way: the rows of its parts that are back, and how many parts are not.
_Batch = tuple[list[np.ndarray], int]


class Pipeline(ABC, Generic[SlotT]):
    """One thread's sets of buffers, and the order in which they are filled, run and given back.

    Args:
        slots: `SLOTS` sets of buffers of one size.
    """

    def __init__(self, slots: Sequence[SlotT]) -> None:
        self._slots = slots
        self._free, self._filled = deque(slots), dict[int, SlotT]()
        self._busy, self._batches = deque[tuple[SlotT, int]](), deque[_Batch]()
        self._running = False

    @abstractmethod
    def _submit(self, slot: SlotT, rows: int) -> None:
        """Begin to embed `slot.images[:rows]` into `slot.embeddings[:rows]`; raises UserError where the GPU failed."""

    @abstractmethod
    def _wait(self, slot: SlotT) -> None:
        """Wait for the embeddings that were begun in this slot."""

    @abstractmethod
    def _drain(self) -> None:
        """Wait for everything that was begun."""

    def buffer(self, images: int) -> np.ndarray:
        """As `Backend.buffer`: pinned memory while a set of buffers is free besides one for what comes otherwise."""
        most, *image = self._slots[0].images.shape
        if len(self._free) > 1 and 0 < images <= most:
            slot = self._free.popleft()
            array = slot.images[:images]
            self._filled[array.ctypes.data] = slot
            return array
        return np.empty((images, *image), np.uint8)

    def run(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 `[n, height, width, 3]` of any n -> float32 `[n, dim]`, new arrays, in order.

        Raises:
            UserError: the GPU failed.
            RuntimeError: an earlier iterator of this thread is not used up.
        """
        if self._running:
            raise RuntimeError("use up the iterator of the earlier batches first: they share this thread's buffers")
        self._running = True
        try:
            for batch in batches:
                yield from self._begin(batch)
                while len(self._busy) > 1:  # one stays on its way while the next is made
                    yield from self._collect()
                yield from self._whole()
            while self._busy:
                yield from self._collect()
        finally:
            self._running = False
            self._free, self._filled = deque(self._slots), {}
            self._busy.clear()
            self._batches.clear()
            self._drain()  # where the caller stopped early, copies may be on their way to and from the buffers

    def _begin(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        """Begin a batch, in parts where it is large; give out earlier ones that are waited for meanwhile."""
        most, dim = self._slots[0].embeddings.shape
        own = self._filled.pop(batch.ctypes.data, None)
        parts = split_batch(batch, most)
        self._batches.append(([] if parts else [np.empty((0, dim), np.float32)], len(parts)))
        for part in parts:
            while own is None and not self._free and self._busy:
                yield from self._collect()
            slot = own or self._free.popleft()
            if own is None:
                self._fill(slot, part)
            self._submit(slot, len(part))
            self._busy.append((slot, len(part)))

    @staticmethod
    def _fill(slot: SlotT, images: np.ndarray) -> None:
        slot.images[: len(images)] = images

    def _collect(self) -> Iterator[np.ndarray]:
        """Wait for the oldest part; give out the batches that are whole with it."""
        slot, rows = self._busy.popleft()
        self._wait(slot)
        at = next(index for index, (_, missing) in enumerate(self._batches) if missing)
        parts, missing = self._batches[at]
        self._batches[at] = ([*parts, slot.embeddings[:rows].copy()], missing - 1)
        self._free.append(slot)
        yield from self._whole()

    def _whole(self) -> Iterator[np.ndarray]:
        while self._batches and not self._batches[0][1]:
            parts, _ = self._batches.popleft()
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)
