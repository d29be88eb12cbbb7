"""ONNX Runtime's GPU providers: what is said without them, and, with a GPU, that embeddings are the CPU's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from mgn_deploy.backends.onnxruntime.session import (
    CPU,
    CUDA,
    CUDA_OPTIONS,
    gpu_errors,
    open_session,
    placement,
)
from mgn_deploy.backends.opening import open_backend
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.cuda import errors as cuda_errors
from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.images.decode import read_crop

AZURE = "AzureExecutionProvider"  # of the wheels for CPUs; it has no kernel for any operator of ours
NAMES = ("onnxruntime-cuda",)


needs_no_gpu = pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")
needs_azure = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason="a build of ONNX Runtime without the Azure provider"
)


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> bytes:
    return Bundle.open(bundle_folder).read(GRAPH)


def with_manifest(bundle_folder: Path, **changes) -> Bundle:
    bundle = Bundle.open(bundle_folder)
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=changes))


# Refusals


@needs_no_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_where_a_provider_does_not_load_no_session_is_opened_on_the_cpu(graph, capfd) -> None:
    with pytest.raises(CannotRun, match=r"did not load CUDAExecutionProvider|CUDA failure"):
        open_session(graph, {CUDA: CUDA_OPTIONS})
    assert "Falling back" not in capfd.readouterr().out


@needs_azure
def test_operators_that_would_go_to_the_cpu_are_named(graph) -> None:
    with pytest.raises(CannotRun, match=r"AzureExecutionProvider cannot run .*Conv.*on the CPU: choose another"):
        open_session(graph, {AZURE: {}})


@needs_azure
def test_a_first_provider_that_takes_nothing_is_refused(graph) -> None:
    with pytest.raises(CannotRun, match=r"AzureExecutionProvider takes none .*CPUExecutionProvider all"):
        open_session(graph, {AZURE: {}, CPU: {}})


@pytest.mark.parametrize("name", NAMES)
def test_without_onnxruntime_the_sentence_names_the_gpu_extra(name: str) -> None:
    program = (
        "import sys\nsys.modules['onnxruntime'] = None\nfrom mgn_deploy.backends.registry import ENGINES\n"
        f"print(ENGINES[{name!r}].load().missing())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "onnxruntime is not installed (pip install 'mgn-deploy[gpu]')\n"


@needs_no_gpu
@pytest.mark.parametrize(("name", "provider"), [(NAMES[0], CUDA)])
def test_a_build_without_the_provider_and_a_machine_without_a_gpu_are_told_apart(name: str, provider: str) -> None:
    reason = ENGINES[name].load().missing()
    if provider in onnxruntime.get_available_providers():
        assert "NVIDIA driver" in reason
    else:
        assert reason == (
            f"the installed onnxruntime {onnxruntime.__version__} is built without {provider} "
            "(pip uninstall onnxruntime, then pip install 'mgn-deploy[gpu]')"
        )


@needs_no_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_backend_that_is_asked_for_by_name_is_refused_without_a_gpu(bundle_folder: Path, name: str) -> None:
    proof = Bundle.open(bundle_folder).manifest.proofs["onnxruntime"]
    with pytest.raises(CannotRun, match=f"backend {name} cannot run here: "):
        open_backend(with_manifest(bundle_folder, proofs={name: proof}), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_proof_on_the_cpu_is_none_for_a_gpu_backend(bundle_folder: Path, name: str) -> None:
    proof = Bundle.open(bundle_folder).manifest.proofs["onnxruntime"]
    with pytest.raises(CannotRun, match=rf"no proof for {name} \(proven: onnxruntime\)"):
        open_backend(with_manifest(bundle_folder, proofs={"onnxruntime": proof}), name)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (
            "cuda_call.cc:154 CUDA failure 2: out of memory ; GPU=0 ; hostname=a ; expr=cudaMalloc(&p, size);",
            "smaller batch",
        ),
        ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 939524096", "smaller batch"),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", "cannot use it any more"),
        ("CUDA failure 1: invalid argument ; GPU=0", "refused a call"),
    ],
)
def test_cudas_errors_in_onnxruntimes_words_become_what_the_user_can_do(message, advice, monkeypatch) -> None:
    monkeypatch.setattr(cuda_errors, "_lost", [])
    with pytest.raises(UserError, match=advice), gpu_errors():
        raise RuntimeError(message)


def test_an_error_that_is_not_cudas_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="not CUDA's"), gpu_errors():
        raise ValueError("not CUDA's")


# CUDA's libraries


def test_no_int8_graph_is_for_the_cuda_provider() -> None:
    row = ENGINES["onnxruntime-cuda"]
    assert (row.int8_for, row.placement) == ((), None)
    assert "int8" not in row.precisions


# What follows needs a GPU.


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.stack([read_crop(Image.fromarray(pixels), 96, 32) for pixels in draw_people(70)])


@pytest.fixture(params=NAMES)
def engine(request: pytest.FixtureRequest, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU backend that has opened the small bundle."""
    backend = ENGINES[request.param].load()
    reason = backend.missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return backend.open(Bundle.open(bundle_folder))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 8, 64, 70])
def test_embeddings_are_the_cpus_at_any_batch_size(engine, embedder: Embedder, crops, size: int) -> None:
    expected = embedder.backend(crops[:size])
    found = engine(crops[:size])
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.gpu
def test_the_same_batch_has_the_same_bits_whatever_ran_between(engine, crops) -> None:
    first = engine(crops[:8])
    kept = first.copy()
    for size in (1, 3, 13, 9, 5, 2):
        engine(crops[8 : 8 + size])
    assert np.array_equal(engine(crops[:8]), first)
    assert np.array_equal(first, kept)


@pytest.mark.gpu
def test_a_result_is_of_its_own_batch_and_not_of_the_one_before(engine, embedder: Embedder, crops) -> None:
    for start in range(0, 64, 8):
        batch = np.ascontiguousarray(crops[start : start + 8])
        assert np.abs(engine(batch) - embedder.backend(batch)).max() < 1e-4


@pytest.mark.gpu
def test_no_operator_is_on_the_cpu(engine) -> None:
    session = engine._session._session
    assert session.get_providers()[0] == CUDA
    assert CPU not in placement(session)


@pytest.mark.gpu
def test_float32_is_float32(engine, embedder: Embedder, crops) -> None:
    """TensorFloat-32 rounds to 10 bits: the worst cosine would be some 1e-6 lower."""
    expected = embedder.backend(crops)
    assert (1 - (engine(crops).astype(np.float64) * expected).sum(axis=1)).max() < 1e-6


@pytest.mark.gpu
def test_the_cuda_provider_runs_a_float16_graph(bundle_folder: Path, graph: bytes, embedder: Embedder, crops) -> None:
    reason = ENGINES["onnxruntime-cuda"].load().missing()
    if reason:
        pytest.skip(reason)
    model = onnx.load_from_string(graph)
    half = to_half(model, "fp16", measure_ranges(model, crops[:16]))
    manifest = with_manifest(bundle_folder, precision="fp16").manifest
    found = ENGINES["onnxruntime-cuda"].load().open_graph(half.SerializeToString(), manifest.model)(crops[:8])
    assert (found * embedder.backend(crops[:8])).sum(axis=1).min() > 0.9999
