"""TensorRT-RTX, for GeForce and RTX GPUs: its plans are built ahead of time, on a machine with no GPU."""

from __future__ import annotations

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.tensorrt.runner import TensorRtBackend, missing_parts
from mgn_deploy.bundle.bundle import Bundle


def missing() -> str | None:
    return missing_parts("tensorrt_rtx")


def open_engine(bundle: Bundle) -> Backend:
    return TensorRtBackend(bundle, "tensorrt_rtx")
