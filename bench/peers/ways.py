"""How others run such a network: each way is opened once and then run over the same crops again and again.

No package of a peer is needed: what is not installed is a row that says so. Of torchreid, whose release on PyPI cannot
run a model that is not its own, it is the loop that counts: batches of 32 from a DataLoader, resized by torchvision.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mgn_deploy.backends.openvino import openvino_core
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun
from mgn_deploy.machine import cpu_features
from mgn_deploy.packages import require

TORCHREID_BATCH, TORCHREID_WORKERS = 32, 4  # its defaults
DROP = 0.001  # of the mean cosine that NNCF's accuracy control may lose


@dataclass(frozen=True)
class Given:
    """What all peers get: a float bundle and perhaps our INT8 one, image files and their crops, crops to calibrate on,
    images a call, seconds of a run for a tool that times itself, and a folder."""

    bundle: Bundle
    int8: Bundle | None
    paths: list[Path]
    crops: np.ndarray
    calibration: np.ndarray | None
    batch: int
    seconds: float
    scratch: Path

    @property
    def graph(self) -> bytes:
        return self.bundle.read(GRAPH)

    def batches(self) -> Iterator[np.ndarray]:
        return (self.crops[at : at + self.batch] for at in range(0, len(self.crops), self.batch))

    def to_calibrate(self) -> np.ndarray:
        if self.calibration is None:
            raise CannotRun("give --calib DIR to quantise")
        return self.calibration


# Runs over all crops and returns their embeddings, or, of a tool that times itself, images a second.
Run = Callable[[], np.ndarray | float]


@dataclass(frozen=True)
class Peer:
    name: str
    remark: str
    open: Callable[[Given], Run]


def _in_batches(given: Given, embed: Callable[[np.ndarray], np.ndarray]) -> Run:
    return lambda: np.concatenate([embed(batch) for batch in given.batches()])


def _ours(given: Given, bundle: Bundle | None = None) -> Run:
    backend = Embedder.open(bundle or given.bundle).backend
    return lambda: np.concatenate(list(backend.stream(given.batches())))


def _ours_int8(given: Given) -> Run:
    if given.int8 is None:
        raise CannotRun("give --int8 BUNDLE, which `export --precision int8` made of the same weights and mirror")
    return _ours(given, given.int8)


def _ours_from_files(given: Given) -> Run:
    embedder = Embedder.open(given.bundle)
    return lambda: embedder.embed(given.paths, batch_size=given.batch)


def _eager(given: Given) -> Run:
    return _in_batches(given, Embedder.open_reference(given.bundle).backend)


def _compiled(given: Given) -> Run:
    from mgn_deploy.bench.gpu.rivals import TorchRival

    return _in_batches(given, TorchRival(given.bundle, "fp32", "compiled"))


def _torchreid_loop(given: Given) -> Run:
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    backend: Any = Embedder.open_reference(given.bundle).backend
    embedding, device, config = backend._embedding, backend._device, given.bundle.config
    steps = [transforms.Resize((config.height, config.width)), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize(config.mean, config.std)])

    class Files(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(given.paths)

        def __getitem__(self, index: int) -> torch.Tensor:
            return prepare(Image.open(given.paths[index]).convert("RGB"))

    def run() -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for images in DataLoader(Files(), TORCHREID_BATCH, num_workers=TORCHREID_WORKERS):
                features = embedding.model(images.to(device))
                if embedding.flip:
                    features = (features + embedding.model(images.to(device).flip(3))) / 2
                rows.append(torch.nn.functional.normalize(features, dim=1).cpu().numpy())
        return np.concatenate(rows)

    return run


def _one_image_a_call(given: Given) -> Run:
    require("onnxruntime", "cpu", "this way")
    session = _session(given.graph)
    return lambda: np.concatenate([session.run(None, {"images": one[None]})[0] for one in given.crops])


def _session(graph: bytes | str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _benchmark_app(given: Given) -> Run:
    require("openvino", "cpu", "this way")
    model = given.scratch / "graph.onnx"
    model.write_bytes(given.graph)
    shape = f"images[{given.batch},{given.crops.shape[1]},{given.crops.shape[2]},3]"
    seconds = str(max(1, round(given.seconds)))
    command = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()", "-m", str(model)]
    command += ["-shape", shape, "-t", seconds, "-hint", "throughput", "-infer_precision", "f32", "-d", "CPU"]

    def run() -> float:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        found = re.search(r"Throughput:\s+([\d.]+)", done.stdout)
        if found is None:
            raise RuntimeError(f"benchmark_app: {' '.join((done.stdout + done.stderr).split())[-300:]}")
        return float(found[1])

    return run


def _nncf(given: Given) -> Run:
    nncf, model, data, count = _to_nncf(given)
    return _in_batches(given, _openvino(nncf.quantize(model, data, subset_size=count)))


def _nncf_control(given: Given) -> Run:
    """In a process of its own: once NNCF had ranked layers here, the bench ended with SIGSEGV in its rounds, where a
    DataLoader's workers end and signal it (`openvino_core` has why a signal may do that)."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        model = process.submit(_quantise_with_control, given).result()
    return _in_batches(given, _openvino(openvino_core().read_model(model)))


def _quantise_with_control(given: Given) -> str:
    from mgn_deploy.export.proof.agreement import cosines

    nncf, model, data, count = _to_nncf(given)
    import openvino

    plain = _openvino(model)

    def likeness(compiled: Any, items: Any) -> tuple[float, None]:  # of all, or of some, by which NNCF ranks layers
        pairs = [(np.array(compiled(one)[0]), plain(one)) for one in items]
        return float(cosines(*map(np.concatenate, zip(*pairs, strict=True))).mean()), None

    validation = nncf.Dataset(list(given.crops[: 4 * given.batch, None]))
    quantised = nncf.quantize_with_accuracy_control(model, data, validation, likeness, max_drop=DROP, subset_size=count)
    written = str(given.scratch / "controlled.xml")
    openvino.save_model(quantised, written, compress_to_fp16=False)
    return written


def _to_nncf(given: Given) -> tuple[Any, Any, Any, int]:
    """NNCF, the model, and what it calibrates on."""
    require("openvino", "cpu", "this way")
    require("nncf", "peers", "this way")
    import nncf

    calibration = given.to_calibrate()
    return nncf, openvino_core().read_model(given.graph), nncf.Dataset(list(calibration[:, None])), len(calibration)


def _openvino(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """As `backends/openvino.py` runs a graph."""
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino_core().compile_model(model, "CPU", hints).create_infer_request()

    def embed(images: np.ndarray) -> np.ndarray:
        request.infer([images], share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return embed


def _quantize_static(given: Given) -> Run:
    require("onnxruntime", "cpu", "this way")
    require("onnx", "cpu", "this way")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    left = ({"images": one[None]} for one in given.to_calibrate())
    reader = SimpleNamespace(get_next=lambda: next(left, None))  # all that it takes of a CalibrationDataReader
    source, target = given.scratch / "float.onnx", given.scratch / "static.onnx"
    source.write_bytes(given.graph)
    vnni = any("vnni" in name for name in cpu_features())
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    # With zero points and 8 bits AVX2 kernels add two products in 16 bits: `reduce_range` is what its guide advises.
    quantize_static(
        source, target, reader, quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=not vnni, **kinds
    )
    session = _session(str(target))
    return _in_batches(given, lambda images: session.run(None, {"images": images})[0])


OURS, OURS_FROM_FILES = "mgn-deploy", "mgn-deploy from files"
PEERS: Sequence[Peer] = (
    Peer(OURS, "the fastest proven engine", _ours),
    Peer("ONNX Runtime, one image a call", "as fast-reid's ONNX tool does", _one_image_a_call),
    Peer("OpenVINO benchmark_app", "its throughput mode: several requests at once, no embeddings kept", _benchmark_app),
    Peer("PyTorch eager", "float32, batch norms not folded", _eager),
    Peer("torch.compile", "float32, batch norms folded", _compiled),
    Peer(OURS_FROM_FILES, "decoded on threads while the engine runs", _ours_from_files),
    Peer("torchreid's loop in plain PyTorch, from files", "DataLoader of 4 workers, batch 32", _torchreid_loop),
    Peer("mgn-deploy INT8", "of --int8", _ours_int8),
    Peer("NNCF quantize", "its defaults, by OpenVINO", _nncf),
    Peer("NNCF quantize_with_accuracy_control", f"mean cosine may lose {DROP}", _nncf_control),
    Peer("ONNX Runtime quantize_static", "QDQ, by channel", _quantize_static),
)
