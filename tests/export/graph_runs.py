"""A graph's outputs on the engines of this machine, to be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.images.decode import read_crop
from mgn_deploy.train.model import MGN

OPENVINO = ENGINES["openvino"].placement
ONNXRUNTIME = ENGINES["onnxruntime"].placement
TENSORRT = ENGINES["tensorrt"].placement
TENSORRT_RTX = ENGINES["tensorrt-rtx"].placement


def read_pixels(crops: Path) -> np.ndarray:
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))[:24]])


def every_output(graph: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": pixels})


def by_onnxruntime(graph: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    return every_output(graph, pixels)[0]


def by_openvino(graph: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    core = openvino_core()
    model = core.read_model(graph.SerializeToString())
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    request.infer([pixels])
    return np.array(request.get_output_tensor(0).data)


def worst_cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first.astype(np.float64) * second).sum(axis=1).min())


def scaled_up(model: MGN, factor: float) -> MGN:
    """A block's activations scaled up beyond float16 by its weights, and down again by the next."""
    block = model.trunk[4][0]
    for parameter in (block.bn1.weight, block.bn1.bias):
        parameter.data *= factor
    block.conv2.weight.data /= factor
    return model


INT8 = [
    (OPENVINO, by_openvino),
    (ONNXRUNTIME, by_onnxruntime),
    (TENSORRT, by_onnxruntime),
    (TENSORRT_RTX, by_onnxruntime),
]
