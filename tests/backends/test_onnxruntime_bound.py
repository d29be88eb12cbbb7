"""Bound runs of ONNX Runtime, on the CPU, where its operators are, and graphs for channels last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mgn_deploy.backends.heads.cut import channels_last, cut_trunk, is_half
from mgn_deploy.backends.onnxruntime.cuda import open_cuda
from mgn_deploy.backends.onnxruntime.session import (
    CPU,
    CUDA,
    KEPT_SIZES,
    BoundSession,
    open_session,
    placement,
)
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.errors import CannotRun
from mgn_deploy.export.precision.half import to_half
from mgn_deploy.export.precision.ranges import measure_ranges


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 96, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> bytes:
    return Bundle.open(bundle_folder).read(GRAPH)


@pytest.fixture(scope="module")
def session(graph: bytes):
    return open_session(graph, {CPU: {}})


@pytest.fixture
def bound(session) -> BoundSession:
    """What the GPU backends run, in the CPU's memory."""
    return BoundSession(session, "cpu", 128)


# Bound runs


def test_bound_runs_give_the_very_bits_of_unbound_ones_at_any_batch_size(bound, session, pixels) -> None:
    for size in (1, 8, 3, 8, 1, 9, 2, 4, 5, 8):
        for start in (0, 9 - size):
            batch = np.ascontiguousarray(pixels[start : start + size])
            assert np.array_equal(bound(batch), session.run(["embeddings"], {"images": batch})[0])


def test_a_bound_result_is_not_overwritten_by_the_next_call(bound, pixels) -> None:
    first = bound(pixels[:3])
    kept = first.copy()
    assert not np.array_equal(bound(pixels[3:6]), first)
    assert np.array_equal(first, kept)


def test_the_images_of_a_bound_run_are_copied_and_left_as_they_were(bound, pixels) -> None:
    batch = pixels[:3].copy()
    expected = bound(batch)
    assert np.array_equal(batch, pixels[:3])
    batch[:] = 0
    assert np.array_equal(bound(np.ascontiguousarray(pixels[:3])), expected)


def test_buffers_stay_for_the_batch_sizes_that_were_used_last(bound, pixels) -> None:
    for size in (1, 2, 3, 1, 4, 5):
        bound(pixels[:size])
    assert KEPT_SIZES == 4
    assert [shape[0] for shape, _ in bound._buffers] == [3, 1, 4, 5]


@pytest.mark.parametrize("wrong", [(2, 32, 96, 3), (2, 3, 96, 32), (4, 48, 32, 3)])
def test_images_of_another_shape_but_the_right_size_are_refused(bound, pixels, wrong) -> None:
    bound(pixels[:2])
    with pytest.raises(Exception, match="invalid dimensions"):
        bound(pixels[:2].reshape(wrong))


def test_images_of_another_type_are_refused(bound, pixels) -> None:
    bound(pixels[:2])
    with pytest.raises(Exception, match="data type"):
        bound(pixels[:2].astype(np.float32))


# Refusals


def test_a_session_tells_where_its_operators_are(session) -> None:
    placed = placement(session)
    assert set(placed) <= {CPU}  # none before ONNX Runtime 1.24
    if placed:
        assert {"Conv", "MaxPool", "MatMul"} <= set(placed[CPU])


# Channels last


def test_half_precision_asks_for_channels_last_and_goes_on_without_where_the_build_has_none(monkeypatch) -> None:
    asked = []

    def open_session(graph, providers):
        asked.append((graph, providers[CUDA].get("prefer_nhwc"), providers[CUDA]["user_compute_stream"]))
        if "prefer_nhwc" in providers[CUDA]:
            raise CannotRun("this build does not support NHWC layout")
        return "session"

    monkeypatch.setattr("mgn_deploy.backends.onnxruntime.cuda.open_session", open_session)
    assert open_cuda(b"first", b"last", user_compute_stream="7") == ("session", "nchw")
    assert asked == [(b"last", "1", "7"), (b"first", None, "7")]
    asked.clear()
    assert open_cuda(b"first", None, user_compute_stream="7") == ("session", "nchw")
    assert asked == [(b"first", None, "7")]


def test_where_the_build_has_channels_last_the_graph_for_them_is_opened(monkeypatch) -> None:
    monkeypatch.setattr("mgn_deploy.backends.onnxruntime.cuda.open_session", lambda graph, providers: graph)
    assert open_cuda(b"first", b"last") == (b"last", "nhwc")


def test_a_trunk_for_channels_last_gives_the_same_maps_turned(graph, pixels) -> None:
    trunk = cut_trunk(onnx.load_from_string(graph))
    before = [output.name for output in trunk.graph.output]
    turned = channels_last(trunk)
    assert [output.name for output in turned.graph.output] == before == [output.name for output in trunk.graph.output]
    first, last = (open_session(one.SerializeToString(), {CPU: {}}) for one in (trunk, turned))
    expected = first.run(None, {"images": pixels})
    for output, map_, turned_map in zip(last.get_outputs(), expected, last.run(None, {"images": pixels}), strict=True):
        assert list(output.shape[1:]) == list(turned_map.shape[1:])
        np.testing.assert_array_equal(turned_map, map_.transpose(0, 2, 3, 1))


def test_a_graph_is_half_where_most_of_its_numbers_are(graph, pixels) -> None:
    exact = onnx.load_from_string(graph)
    assert not is_half(exact)
    assert is_half(to_half(exact, "fp16", measure_ranges(exact, pixels)))
    assert not is_half(to_half(exact, "bf16", measure_ranges(exact, pixels)))
