"""Builds that are stopped, refused or reported, in a sentence each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from builds import build
from onnx import TensorProto, helper

from mgn_deploy.backends.tensorrt.builder import BuildSettings
from mgn_deploy.backends.tensorrt.package import logger, one_line
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.options import parse_batch, parse_capabilities
from mgn_deploy.files import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> onnx.ModelProto:
    return onnx.load_from_string(Bundle.open(bundle_folder).read(GRAPH))


def odd_graph(operator: str, domain: str = "", batch: int | str = "n") -> onnx.ModelProto:
    """Images through one operator."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], name="to_float", to=TensorProto.FLOAT),
        helper.make_node(operator, ["pixels"], ["embeddings"], name="trunk/odd", domain=domain),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 4, 4, 3])]
    outputs = [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "odd", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def stopped_early() -> bool:
    """A build that runs to its end logs the layer table."""
    return logger("tensorrt-rtx").messages.layers is None


def test_every_phase_is_reported_up_to_its_last_step(graph: onnx.ModelProto) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    build(graph, progress=lambda phase, step, steps: seen.setdefault(phase, []).append((step, steps)))
    assert len(seen) > 3
    assert all(steps[0][0] == 0 and steps[-1][0] == steps[-1][1] for steps in seen.values())


def test_ctrl_c_stops_the_build_and_the_next_one_works(graph: onnx.ModelProto, tmp_path: Path) -> None:
    """In a process of its own, as on the command line."""
    onnx.save(graph, tmp_path / "graph.onnx")
    program = """
import os, signal, sys, onnx
from mgn_deploy.files import cache_folder
from mgn_deploy.backends.tensorrt.builder import BuildSettings, build_plans
graph, settings, steps = onnx.load(sys.argv[1]), BuildSettings("tensorrt-rtx", (1, 4, 8)), []
def interrupt(phase, step, of):
    steps.append(step)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGINT)
try:
    build_plans(graph, settings, ["8.6"], progress=interrupt)
except KeyboardInterrupt:
    print("stopped", cache_folder("plans").exists())
print(build_plans(graph, settings, ["8.6"])[0].cached)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(tmp_path / "graph.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert (done.returncode, done.stdout.split()) == (0, ["stopped", "False", "False"]), done.stderr


def test_what_progress_raises_stops_the_build_and_reaches_the_caller(graph: onnx.ModelProto) -> None:
    def fail(phase: str, step: int, steps: int) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        build(graph, progress=fail)
    assert stopped_early()
    assert not cache_folder("plans").exists()


@pytest.mark.parametrize(
    ("operator", "domain", "reason"),
    [
        ("Frobnicate", "elsewhere", "Plugin not found, are the plugin name, version, and namespace correct?"),
        ("Det", "", "unsupported node"),
    ],
)
def test_a_refused_graph_is_one_sentence_with_the_node_and_operator(operator: str, domain: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        build(odd_graph(operator, domain))
    sentence = str(caught.value)
    assert f"refuses the graph: node 'trunk/odd' ({operator}): " in sentence
    assert sentence.endswith(reason)
    assert "\n" not in sentence


def test_a_graph_that_cannot_be_built_is_one_sentence() -> None:
    with pytest.raises(UserError) as caught:
        build(odd_graph("Relu", batch=2))
    sentence = str(caught.value)
    assert " cannot build the graph: Input tensor images has static dimensions" in sentence
    assert sentence.endswith("profile dimensions are [1,4,4,3]")


def test_a_graph_without_images_is_refused() -> None:
    graph = odd_graph("Relu")
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(UserError, match="inputs are images, and not uint8 images"):
        build(graph)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (BuildSettings("tensorrt-rtx", (4, 1, 8)), "1 <= min <= opt <= max"),
        (BuildSettings("tensorrt-rtx", (0, 1, 8)), "1 <= min <= opt <= max"),
        (
            BuildSettings("tensorrt-rtx", compute_capability="9.0"),
            r"builds for compute capability 7\.5, 8\.0.*not for '9\.0'",
        ),
        (BuildSettings("tensorrt-rtx", version_compatible=True), "leave out --version-compatible"),
        (BuildSettings("tensorrt-rtx", hardware_compatible=True), "and --hardware-compatible"),
        (BuildSettings("tensorrt-rtx", workspace=0), "holds nothing"),
        (BuildSettings("tensorrt", compute_capability="8.6"), "use --engine tensorrt-rtx"),
    ],
)
def test_settings_that_it_cannot_build_for_are_refused(graph: onnx.ModelProto, settings, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        build(graph, settings)


def test_a_builder_that_is_not_installed_is_named_with_its_extra(graph: onnx.ModelProto) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("tensorrt is installed here")
    with pytest.raises(CannotRun, match=r"TensorRT cannot build here: .*mgn-deploy\[tensorrt\]"):
        build(graph, BuildSettings("tensorrt"))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 68844892952 bytes.)",
         "OutOfMemory (Requested size was 68844892952 bytes.)"),
        ("In node -1 with name: and operator: the weights are short.", "the weights are short"),
    ],
)  # fmt: skip
def test_a_message_of_tensorrt_loses_the_place_in_its_source(said: str, sentence: str) -> None:
    assert one_line(said) == sentence


def test_the_command_lines_batch_and_capabilities_are_read() -> None:
    assert parse_batch("1,32,64") == (1, 32, 64)
    assert parse_capabilities("8.6, 8.9,12.0,8.6") == ("8.6", "8.9", "12.0")


@pytest.mark.parametrize("text", ["", "1,2", "1,2,x", "2,1,4", "1,2,3,4", "1,8,4097"])
def test_a_batch_that_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="min"):
        parse_batch(text)
