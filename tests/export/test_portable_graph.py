"""`graph.onnx` in the hands of tools that know nothing of mgn-deploy: unmodified readers give the same embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from mgn_deploy.backends.heads.cut import FEATURE_MAPS, MIRROR_AVERAGE
from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.export.graph.trace import build_graph
from mgn_deploy.train.weights import new_model

BATCHES = (1, 3, 8, 33)
Run = Callable[[np.ndarray], np.ndarray]


def open_onnxruntime(path: Path) -> Run:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def open_openvino(path: Path) -> Run:
    core = openvino_core()
    # float32 also on CPUs with bfloat16, as the README says
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled([images])[0]


def open_openvino_converted(path: Path) -> Run:
    """As the command `ovc graph.onnx` converts it."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino_core().compile_model(openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled([images])[0]


def open_opencv(path: Path) -> Run:
    cv2 = pytest.importorskip("cv2")
    if int(cv2.__version__.partition(".")[0]) < 5:
        pytest.skip("OpenCV before 5 reads no graph with a batch of any size")
    net = cv2.dnn.readNetFromONNX(str(path))

    def run(images: np.ndarray) -> np.ndarray:
        net.setInput(images, "images")
        return net.forward()

    return run


def open_reference(path: Path) -> Run:
    evaluator = ReferenceEvaluator(onnx.load(path))
    return lambda images: evaluator.run(None, {"images": images})[0]


READERS = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "openvino-ovc": open_openvino_converted,
    "opencv": open_opencv,
    "onnx-reference": open_reference,
}


@pytest.mark.parametrize("reader", READERS)
def test_an_unmodified_reader_gives_the_same_embeddings(bundle_folder: Path, embedder, reader: str) -> None:
    run = READERS[reader](bundle_folder / GRAPH)
    for size in BATCHES:
        images = np.random.default_rng(size).integers(0, 256, (size, 96, 32, 3), np.uint8)
        found, expected = run(images), embedder.backend(images)
        assert (found.dtype, found.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"pooling": "avg", "neck": "linear"}, {"pooling": "gem", "neck": "relu_norm", "branches": (1, 4)}]
)
@pytest.mark.parametrize("flip", [True, False])
def test_a_graph_has_standard_operators_only_and_names_its_maps(bundle_folder: Path, changes, flip: bool) -> None:
    from conftest import SMALL

    config = SMALL.model_copy(update=changes)
    graph = build_graph(new_model(config, seed=1), flip)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", 18)]
    assert not graph.functions
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    maps = [f"map_{branch}" for branch in range(len(config.branches))]
    assert facts == {FEATURE_MAPS: ",".join(maps), MIRROR_AVERAGE: str(flip).lower()}
    assert {*maps} <= {output for node in graph.graph.node for output in node.output}
