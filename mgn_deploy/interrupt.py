"""Ctrl-C, SIGTERM and SIGHUP: all three end a command in the same way, at once or at the end of a step.

`docker stop`, systemd, Slurm and torchrun send SIGTERM and kill some seconds later; a terminal that goes away sends
SIGHUP. A signal that is ignored from the start, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A KeyboardInterrupt by the signal `number`; `exit_code` is a shell's: 130, 143 (SIGTERM) or 129 (SIGHUP)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within it each of the signals raises `Stopped` in the main thread, as Ctrl-C raises KeyboardInterrupt.

    Elsewhere than in the main thread it does nothing: only there can signals be handled.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = _handle(stop)
    try:
        yield
    finally:
        _restore(before)


class DeferredInterrupt:
    """A context manager in which the first signal only sets `wanted`, for work that must not stop within a step.

    `wanted` is the signal's number, 0 before any. A second signal acts at once, as outside.
    """

    def __init__(self) -> None:
        self.wanted = 0
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> DeferredInterrupt:
        self._before = _handle(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = number
        _restore(self._before)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, signal._HANDLER]:
    """Set the handler of all signals that are not ignored, and return the earlier ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore(before: dict[signal.Signals, signal._HANDLER]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
