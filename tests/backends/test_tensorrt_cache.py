"""Plans in the cache: when they are taken, and what is in it that is not."""

from __future__ import annotations

import pwd
from pathlib import Path

import onnx
import pytest
from builds import build

from mgn_deploy.backends.tensorrt.builder import BuildSettings
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.files import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> onnx.ModelProto:
    return onnx.load_from_string(Bundle.open(bundle_folder).read(GRAPH))


def test_a_plan_is_taken_from_the_cache_the_second_time(graph: onnx.ModelProto) -> None:
    first, second = build(graph), build(graph)
    assert (first.cached, second.cached) == (False, True)
    assert second.content == first.content
    assert second.layers == first.layers


@pytest.mark.parametrize(
    "settings",
    [
        BuildSettings("tensorrt-rtx", (1, 4, 9), "8.6"),
        BuildSettings("tensorrt-rtx", (1, 4, 8), "8.9"),
        BuildSettings("tensorrt-rtx", (1, 4, 8), "8.6", workspace=1 << 30),
    ],
    ids=["shapes", "capability", "workspace"],
)
def test_the_cache_has_nothing_for_other_settings(graph: onnx.ModelProto, settings: BuildSettings) -> None:
    build(graph)
    assert not build(graph, settings).cached


def test_the_cache_has_nothing_for_other_weights(graph: onnx.ModelProto) -> None:
    build(graph)
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    largest = max(other.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = largest.raw_data[4:] + largest.raw_data[:4]
    assert not build(other).cached


def test_a_plan_in_the_cache_with_a_flipped_bit_is_built_anew(graph: onnx.ModelProto) -> None:
    build(graph)
    [file] = cache_folder("plans").glob("*.plan")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert not build(graph).cached
    assert build(graph).cached


@pytest.mark.parametrize(("old", "new"), [(b"Name: images", b"Name: imagez"), (b"{", b"")], ids=["changed", "not JSON"])
def test_a_layer_table_in_the_cache_that_is_not_what_was_written_is_made_anew(
    graph: onnx.ModelProto, old: bytes, new: bytes
) -> None:
    built = build(graph)
    [file] = cache_folder("plans").glob("*.json")
    file.write_bytes(file.read_bytes().replace(old, new))
    again = build(graph)
    assert not again.cached
    assert again.layers == built.layers


def test_without_the_cache_nothing_is_read_or_written(graph: onnx.ModelProto) -> None:
    build(graph, use_cache=False)
    assert not cache_folder("plans").exists()
    build(graph)
    assert not build(graph, use_cache=False).cached


def test_a_cache_that_cannot_be_written_is_warned_of_and_the_plan_is_there(
    graph: onnx.ModelProto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mgn-deploy").write_text("in the way")
    plan = build(graph)
    assert plan.content
    assert not plan.cached
    assert "is not cached" in caplog.text
    assert "set XDG_CACHE_HOME" in caplog.text


def test_a_user_without_a_home_folder_gets_the_plan(
    graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a container's user without an entry in /etc/passwd."""

    def no_entry(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert build(graph).content
    assert "no home folder to keep a cache in" in caplog.text


def test_a_plan_of_another_release_of_this_package_is_not_taken(
    graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the builder tells TensorRT beyond the settings is code."""
    assert not build(graph).cached
    assert build(graph).cached
    monkeypatch.setattr("mgn_deploy.__version__", "999")
    assert not build(graph).cached
