"""Switches off what the engines would report of their use: this tool handles pictures of people.

ONNX Runtime from 1.32 on keeps a device id and a database of events under `~/.cache`; `ORT_DISABLE_TELEMETRY=1`, set
before its import, stops that. OpenVINO, when it is imported, writes `~/intel/openvino_ga_cid` and sends an event by the
package openvino_telemetry; where that package cannot be imported it uses its own stub, which does nothing, and needs no
home folder. A Ray cluster that is started here sends nothing by `RAY_USAGE_STATS_ENABLED=0`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Set what has to be set before any engine is imported; a user's own setting stays."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Within it `import openvino` finds no openvino_telemetry; afterwards other programs in this process may."""
    if _OPENVINO in sys.modules:  # somebody imported it before: it is theirs
        yield
        return
    sys.modules[_OPENVINO] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_OPENVINO]
