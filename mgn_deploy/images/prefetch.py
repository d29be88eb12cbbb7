"""Work on images on threads ahead of the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from mgn_deploy.machine import usable_cpus

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    function: Callable[[T], R], items: Iterable[T], ahead: int | None = None, threads: int | None = None
) -> Iterator[R]:
    """`map` on a few threads, so that decoding overlaps inference.

    Args:
        function: called once an item, on a thread; Pillow and NumPy release the GIL for most of their time.
        items: taken as results are asked for.
        ahead: most calls begun before their result is asked for, which bounds the memory (64, or two a thread).
        threads: how many; None: `decoding_threads()`.
    """
    workers = threads or decoding_threads()
    remaining = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting = deque[Future[R]](
            pool.submit(function, item) for item in islice(remaining, ahead or max(64, 2 * workers))
        )
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def decoding_threads() -> int:
    """As many threads as CPUs that this process may use, and one more for what waits for files."""
    return usable_cpus() + 1


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (Python 3.12's itertools.batched, with lists)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
