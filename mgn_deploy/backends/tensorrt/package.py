"""The one module that knows that TensorRT comes as two packages with one API: `tensorrt` and `tensorrt_rtx`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.manifest import TensorRtName

# Of a library that looks for a GPU also where it needs none.
_HARMLESS = ("cudaError 35", "CUDA driver version is insufficient", "Unable to determine GPU memory usage")


def import_tensorrt(engine: TensorRtName) -> Any:
    """Import the package of that engine.

    Raises:
        ImportError, OSError: it is not installed, or its libraries cannot be loaded.
    """
    return import_module(ENGINES[engine].package)


def title(engine: TensorRtName) -> str:
    """As in "TensorRT-RTX 1.7.1.116"."""
    return f"{ENGINES[engine].title} {import_tensorrt(engine).__version__}"


@dataclass
class Messages:
    """What TensorRT said since the last `clear`: its first error, and the layer table that a build ends with.

    TensorRT logs from threads of its own, and keeps the first logger of the process whatever it is given later.
    """

    error: str | None = None
    layers: str | None = None

    def clear(self) -> None:
        self.error = self.layers = None

    def first_error(self) -> str:
        """The first error in one line, or that there was none."""
        return one_line(self.error) if self.error else "it gave no reason"


def one_line(text: str) -> str:
    """A message of TensorRT in one line, without the position in its source and the category that it wraps some in."""
    line = " ".join(text.split()).removeprefix("In node -1 with name: and operator: ")
    wrapped = re.search(r"Error Code \d+: [\w /]+\((.*?)\.? In \S+ at \S+\)", line)
    asserted = re.search(r'&& "(.*)"$', line)
    placed = re.match(r"\[\S+::\d+\] Error Code \d+: (.*)$", line)
    return (wrapped or asserted or placed or [line, line])[1].rstrip(". ")


@cache
def logger(engine: TensorRtName) -> Any:
    """The process's logger of that package; its `messages` are a `Messages`."""
    trt = import_tensorrt(engine)

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages = Messages()

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                if not self.messages.error and not any(part in text for part in _HARMLESS):
                    self.messages.error = text
            elif text.startswith("Layers:\n"):
                self.messages.layers = text

    return Logger()
