"""Ctrl-C and SIGTERM that wait for the end of a step: half a step is no state to save."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # SIGTERM is what torchrun and job schedulers send before they kill


class DeferredInterrupt:
    """A context manager in which the first signal only sets `wanted`; a second one acts at once, as always."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._active = threading.current_thread() is threading.main_thread()  # only there can signals be handled

    def __enter__(self) -> DeferredInterrupt:
        if self._active:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
