"""Settings for builds by TensorRT-RTX, and one build."""

from __future__ import annotations

import onnx
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed", exc_type=ImportError)

from mgn_deploy.backends.tensorrt.builder import BuildSettings, Plan, build_plans

SETTINGS = BuildSettings("tensorrt-rtx", batch=(1, 4, 8), compute_capability="8.6")


def build(graph: onnx.ModelProto, settings: BuildSettings = SETTINGS, **options) -> Plan:
    return build_plans(graph, settings, **options)[0]
