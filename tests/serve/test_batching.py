"""The queue before the engine: who waits, who is refused, and that everyone gets their own rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from mgn_deploy.backends.base import Backend, BatchLimits
from mgn_deploy.serve.batching import BatchQueue, BatchReport, Closed, Embedded, Overloaded


class Held(Backend):
    """An engine whose row of an image is the image's mean, and which waits until it is let go on."""

    name = "held"

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.calls: list[int] = []
        self.threads: set[int] = set()

    missing = open_graph = None  # type: ignore[assignment]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.calls.append(len(images))
        self.threads.add(threading.get_ident())
        assert self.go_on.wait(30)
        if images.max() == 255:
            raise RuntimeError("the engine refuses white")
        return images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]


def crops(*values: int) -> list[np.ndarray]:
    return [np.full((4, 2, 3), value, np.uint8) for value in values]


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def reports() -> list[BatchReport]:
    return []


@pytest.fixture
def queue(engine: Held, reports: list[BatchReport]) -> Iterator[BatchQueue]:
    queue = BatchQueue(engine, 1, batch=4, wait_seconds=0.05, queued=8, on_batch=reports.append)
    yield queue
    engine.go_on.set()
    queue.close()


def ask(queue: BatchQueue, *values: int) -> np.ndarray:
    with queue.reserve(len(values)):
        return queue.submit(crops(*values)).result(30).rows[:, 0]


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_everyone_gets_the_rows_of_their_own_images_in_order(queue: BatchQueue, engine: Held) -> None:
    engine.go_on.set()
    wanted = [[person] * (1 + person % 5) for person in range(1, 120)]
    with ThreadPoolExecutor(1) as pool:  # one at a time fills no queue
        for values, rows in zip(wanted, pool.map(lambda values: ask(queue, *values), wanted), strict=True):
            assert rows.tolist() == values


def test_images_of_several_callers_share_a_call(queue: BatchQueue, engine: Held) -> None:
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, queue, 1)  # while it runs, the others wait
        wait_until(lambda: engine.calls == [1])
        others = [pool.submit(ask, queue, value) for value in range(2, 8)]
        wait_until(lambda: queue.reserved == 7)
        time.sleep(0.05)
        engine.go_on.set()
        assert [first.result()[0], *(float(other.result()[0]) for other in others)] == [1, 2, 3, 4, 5, 6, 7]
    assert engine.calls == [1, 4, 2]
    assert len(engine.threads) == 1


def test_one_image_waits_for_others_no_longer_than_it_was_told(queue: BatchQueue, engine: Held) -> None:
    engine.go_on.set()
    with queue.reserve(1):
        answer = queue.submit(crops(7)).result(30)
    assert 0.04 < answer.queue_seconds < 5
    assert engine.calls == [1]


def test_a_request_larger_than_a_batch_goes_in_parts(queue: BatchQueue, engine: Held, reports: list) -> None:
    engine.go_on.set()
    assert ask(queue, *range(1, 7)).tolist() == [1, 2, 3, 4, 5, 6]
    assert engine.calls == [4, 2]
    wait_until(lambda: len(reports) == 2)
    assert [(report.images, len(report.waited)) for report in reports] == [(4, 4), (2, 2)]


def test_beyond_its_room_callers_are_refused_and_told_when_to_come_back(queue: BatchQueue, engine: Held) -> None:
    with queue.reserve(6):
        with pytest.raises(Overloaded) as refusal, queue.reserve(3):
            pass
        assert refusal.value.retry_after >= 1
        with queue.reserve(2):
            assert queue.reserved == 8
    assert queue.reserved == 0


def test_a_failing_call_fails_its_own_callers_alone(queue: BatchQueue, engine: Held) -> None:
    engine.go_on.set()
    with pytest.raises(RuntimeError, match="refuses white"):
        ask(queue, 255)
    assert ask(queue, 3).tolist() == [3]


def test_closing_answers_what_was_taken_and_takes_nothing_more(engine: Held) -> None:
    queue = BatchQueue(engine, 1, batch=2, wait_seconds=0, queued=8)
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(ask, queue, value) for value in (1, 2, 3)]
        wait_until(lambda: engine.calls and queue.reserved == 3)
        closing = pool.submit(queue.close)
        wait_until(lambda: is_closed(queue))
        engine.go_on.set()
        assert [float(one.result(30)[0]) for one in taken] == [1, 2, 3]
        closing.result(30)


def is_closed(queue: BatchQueue) -> bool:
    try:
        with queue.reserve(1):
            return False
    except Closed:
        return True


def test_closing_waits_for_a_caller_that_is_still_decoding(engine: Held) -> None:
    engine.go_on.set()
    queue = BatchQueue(engine, 1, batch=2, wait_seconds=0, queued=8)
    with ThreadPoolExecutor(1) as pool:
        with queue.reserve(1):
            closing = pool.submit(queue.close)
            wait_until(lambda: is_closed(queue))
            answer: Future[Embedded] = queue.submit(crops(9))
            assert answer.result(30).rows.tolist() == [[9]]
            assert not closing.done()
        closing.result(30)


def test_the_engines_own_limit_is_the_batch(engine: Held) -> None:
    engine.batch_limits = BatchLimits(1, 2, 3)
    queue = BatchQueue(engine, 1, batch=64)
    assert queue.batch == 3
    queue.close()
