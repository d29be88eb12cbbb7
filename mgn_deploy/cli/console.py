"""Output: results to stdout, progress and what is being done to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

BACKENDS = "auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime or torch."
LOG_SECONDS = 10  # between lines of progress where stderr is no terminal


def say(sentence: str) -> None:
    """One line about what is being done, to stderr."""
    print(sentence.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """A result for machines, to stdout."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A result for people, to stdout, under a line that says what it is; as wide as needed where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        print(title)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


@contextmanager
def progress(label: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows a bar with rate and time left; lines every 10 s where stderr is no terminal."""
    if sys.stderr.isatty():
        with _bar(label, unit) as update:
            yield update
    else:
        yield _LogLines(label, unit)


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.1f} {unit}/s" if speed else "")

        yield update


class _LogLines:
    """Rates count from the first call on: what an earlier run did is not this one's speed."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        before, start = self._first = self._first or (done, now)
        if now - self._last < LOG_SECONDS or done <= before:
            return
        self._last = now
        rate = (done - before) / (now - start)
        say(f"{self._label}: {done}/{total}, {rate:.1f} {self._unit}/s, {(total - done) / rate:.0f} s left")


def phase_lines(label: str) -> Callable[[str, int, int], None]:
    """A function (phase, step, steps) that says every 10 s how far the phase is that it is told of."""
    last = time.monotonic()

    def update(phase: str, step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            say(f"{label}: {phase}, {step}/{steps}")

    return update


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
