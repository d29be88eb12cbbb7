"""Output: results to stdout, progress and what is being done to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, TextIO

from mgn_deploy.errors import GateFailed, UserError
from mgn_deploy.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_log = logging.getLogger("mgn_deploy")
LOG_SECONDS = 10  # between lines of progress where stderr is no terminal


def say(sentence: str) -> None:
    """One line about what is being done, to stderr, among the library's own."""
    _log.info(sentence)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """For programs of `python -m`: what is wrong with their input is one line on stderr, as of the commands."""
    try:
        yield
    except (UserError, GateFailed) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def show_log() -> None:
    """Print what the library logs, INFO and above, on stderr: by rich where it is a terminal, so that progress bars
    stay below."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(
            console=stderr_console(), show_time=False, show_level=False, show_path=False, markup=False, highlighter=None
        )
    else:
        handler = _Lines()
    handler.setFormatter(_Sentences())
    _log.handlers[:] = [handler]
    _log.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    _log.propagate = False


def is_first_process() -> bool:
    """Whether this process tells the user anything: of those that torchrun starts, only the first one does."""
    return os.environ.get("RANK", "0") == "0"


class _Sentences(logging.Formatter):
    """The sentence alone, or after "warning: " where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        sentence = super().format(record)
        return f"{record.levelname.lower()}: {sentence}" if record.levelno >= logging.WARNING else sentence


class _Lines(logging.StreamHandler[TextIO]):
    """Writes to the `sys.stderr` of the moment. Bytes of a file name that are not UTF-8 are shown as \\xNN."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record).encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


@cache
def stderr_console() -> Console:
    """The one that log lines and progress bars share."""
    from rich.console import Console

    return Console(stderr=True)


def print_json(value: object) -> None:
    """A result for machines, to stdout."""
    print(json.dumps(value, indent=2))


def print_result(as_json: bool, value: object, text: object) -> None:
    """A result to stdout: for machines, or in a line for people."""
    if as_json:
        print_json(value)
    else:
        print(text)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, *, stderr: bool = False
) -> None:
    """A result for people, to stdout, under a line that says what it is; as wide as needed where stdout is no
    terminal. `stderr`: what is told besides the result."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = sys.stderr if stderr else sys.stdout
    if title:
        print(title, file=stream)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=stream) if stream.isatty() else Console(file=stream, width=160)
    console.print(table)


@contextmanager
def progress(unit: str = "images") -> Iterator[Progress]:
    """Shows each step of a library call: a bar with rate and time left, or a line every 10 s where stderr is no
    terminal."""
    with _bars(unit) if sys.stderr.isatty() else nullcontext(_TimedLines(unit)) as update:
        yield update


@contextmanager
def _bars(unit: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=stderr_console()) as bars:
        tasks: dict[str, TaskID] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=None, rate="")
            task = tasks[step]
            speed = bars.tasks[task].speed
            bars.update(task, completed=done, total=total, rate=f"{speed:.1f} {unit}/s" if speed else "")

        yield update


class _TimedLines:
    """A line every `LOG_SECONDS`. Rates count from a step's first call on: what an earlier run did is not this one's
    speed."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._said = time.monotonic()
        self._first: dict[str, tuple[int, float]] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        before, start = self._first.setdefault(step, (done, now))
        if now - self._said < LOG_SECONDS or done <= before:
            return
        self._said = now
        rate = (done - before) / (now - start)
        say(f"{step}: {done}/{total}, {rate:.1f} {self._unit}/s, {(total - done) / rate:.0f} s left")


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
