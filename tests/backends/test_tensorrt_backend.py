"""The TensorRT backends: what is said without a GPU and of its errors, and, with a GPU, what runs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plans import rtx, with_plan

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.runner import TensorRtRtxBackend
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.cuda import errors as cuda_errors_module
from mgn_deploy.cuda.buffers import split_batch
from mgn_deploy.cuda.device import gpu_problem, this_gpu
from mgn_deploy.cuda.errors import cuda_errors, cuda_sentence
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.images.decode import read_crop

needs_no_gpu = pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")


@needs_no_gpu
def test_without_a_gpu_one_sentence_says_so() -> None:
    if ENGINES["tensorrt-rtx"].import_problem():
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    reason = TensorRtRtxBackend.missing()
    assert reason in (
        "no NVIDIA driver or GPU was found (libcuda.so.1 cannot be loaded)",
        "the NVIDIA driver sees no GPU",
    ) or reason.startswith("the NVIDIA driver does not start")
    with pytest.raises(CannotRun, match="NVIDIA driver"):
        this_gpu()


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(name) -> None:
    row = ENGINES[name]
    try:
        __import__(row.package)
    except ImportError:
        assert f"{row.package} is not installed (pip install 'mgn-deploy[{name}]')" == row.load().missing()
    else:
        pytest.skip(f"{row.package} is installed here")


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY: the API call failed", "smaller batch"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS: while executing", "cannot use it any more: run the same command again"),
        ("CUDA_ERROR_INVALID_VALUE: one argument", "refused a call"),
        ("cudaError 700: an illegal memory access was encountered", "cannot use it any more"),
        ("cudaError 2: out of memory", "smaller batch"),
        ("cudaError 214: uncorrectable ECC error", "cannot use it any more"),
    ],
)
def test_a_cuda_error_becomes_what_the_user_can_do(message: str, advice: str) -> None:
    sentence = cuda_sentence(message)
    assert message.partition(":")[0] in sentence
    assert advice in sentence


def test_after_a_sticky_error_the_gpu_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_errors_module, "_lost", [])
    with pytest.raises(UserError, match="CUDA_ERROR_LAUNCH_FAILED"), cuda_errors():
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED: an exception occurred on the device")
    tried = []
    with pytest.raises(UserError, match="CUDA_ERROR_LAUNCH_FAILED"), cuda_errors():
        tried.append(True)
    assert not tried


def test_an_error_that_passes_does_not_stop_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_errors_module, "_lost", [])
    with pytest.raises(UserError, match="smaller batch"), cuda_errors():
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no memory")
    with pytest.raises(ValueError, match="not CUDA's"), cuda_errors():
        raise ValueError("not CUDA's")


@pytest.mark.parametrize(("rows", "sizes"), [(0, []), (1, [1]), (4, [4]), (9, [4, 4, 1])])
def test_a_batch_above_the_profile_is_cut(rows: int, sizes: list[int]) -> None:
    batch = np.arange(rows)
    parts = split_batch(batch, 4)
    assert [len(part) for part in parts] == sizes
    assert [value for part in parts for value in part] == list(batch)


# What follows needs a GPU.


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.stack([read_crop(Image.fromarray(pixels), 96, 32) for pixels in draw_people(70)])


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def engine(request: pytest.FixtureRequest, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A backend on a plan that was built for this GPU from the small bundle's graph, for 1 to 64 images a call."""
    backend = ENGINES[request.param].load()
    reason = backend.missing()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return backend.open(Bundle.open(bundle_folder))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 8, 64, 70])
def test_embeddings_are_the_references_at_any_batch_size(engine, embedder: Embedder, crops, size: int) -> None:
    expected = embedder.backend(crops[:size])
    found = engine(crops[:size])
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert (found * expected).sum(axis=1).min() > 0.9999


@pytest.mark.gpu
def test_an_image_has_one_embedding_whatever_its_neighbours_and_place(engine, crops) -> None:
    alone = engine(crops[:1])
    for size, place in ((7, 0), (7, 6), (64, 31), (64, 63)):
        batch = crops[1 : size + 1].copy()
        batch[place] = crops[0]
        assert np.abs(engine(batch)[place] - alone[0]).max() < 1e-4


@pytest.mark.gpu
def test_batches_come_back_in_order_while_two_are_on_their_way(engine, crops) -> None:
    sizes = [8, 8, 1, 0, 70, 8, 3]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) % 5
    batches = [
        np.take(crops, range(start, start + size), axis=0, mode="wrap")
        for start, size in zip(starts, sizes, strict=True)
    ]
    for batch, found in zip(batches, engine.stream(iter(batches)), strict=True):
        np.testing.assert_allclose(found, engine_alone(engine, batch), atol=1e-5)


def engine_alone(engine, batch: np.ndarray) -> np.ndarray:
    """In a thread of its own: the stream's buffers belong to this one."""
    results: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: results.append(engine(batch)))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.gpu
def test_results_stay_when_the_next_batch_comes(engine, crops) -> None:
    first = engine(crops[:4])
    kept = first.copy()
    engine(crops[4:8])
    engine(crops[8:12])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.gpu
def test_a_stream_that_is_left_early_does_not_spoil_the_next(engine, crops) -> None:
    expected = engine(crops[:8])
    next(engine.stream([crops[8:16], crops[16:24], crops[24:32]]))
    np.testing.assert_array_equal(engine(crops[:8]), expected)


@pytest.mark.gpu
def test_threads_share_one_engine(engine, crops) -> None:
    expected = engine(crops[:8])
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.extend(engine(crops[:8]) for _ in range(5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    for found in results:
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.gpu
def test_a_plan_that_tensorrt_does_not_open_is_one_sentence(engine, bundle_folder: Path, tmp_path: Path) -> None:
    plan = rtx(engine=engine.name, version=engine.version, compute_capability=this_gpu().compute_capability)
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(UserError, match="does not open the plan"):
        type(engine).open(with_plan(bundle_folder, folder, plan, b"no plan at all"))
