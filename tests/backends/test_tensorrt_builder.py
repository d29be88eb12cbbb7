"""Real TensorRT-RTX builds of a small bundle's graph, on a machine with or without a GPU."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import layer_table
import numpy as np
import onnx
import pytest
from layer_table import layers_from_log
from onnx import TensorProto, helper, numpy_helper

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.backends.tensorrt.network import prepare
from mgn_deploy.backends.tensorrt.package import logger, one_line
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import GRAPH
from mgn_deploy.datasets.drawn import draw_people
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.options import parse_batch, parse_capabilities
from mgn_deploy.export.precision.quantise import quantise
from mgn_deploy.export.precision.ranges import TensorRange, measure_ranges
from mgn_deploy.images.decode import read_crop

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed", exc_type=ImportError)

from mgn_deploy.backends.tensorrt.builder import BuildSettings, Plan, build_plans
from mgn_deploy.files import cache_folder

TENSORRT_RTX = ENGINES["tensorrt-rtx"].placement

SETTINGS = BuildSettings("tensorrt-rtx", batch=(1, 4, 8), compute_capability="8.6")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def graph(bundle_folder: Path) -> onnx.ModelProto:
    return onnx.load_from_string(Bundle.open(bundle_folder).read(GRAPH))


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    from PIL import Image

    return np.stack([read_crop(Image.fromarray(pixels), 96, 32) for pixels in draw_people(3)])


@pytest.fixture(scope="module")
def ranges(graph: onnx.ModelProto, crops: np.ndarray) -> dict[str, TensorRange]:
    return measure_ranges(graph, crops)


def build(graph: onnx.ModelProto, settings: BuildSettings = SETTINGS, **options) -> Plan:
    return build_plans(graph, settings, **options)[0]


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


def convolutions_of(graph: onnx.ModelProto) -> int:
    return sum(node.op_type == "Conv" for node in graph.graph.node)


def stopped_early() -> bool:
    """A build that runs to its end logs the layer table."""
    return logger("tensorrt-rtx").messages.layers is None


def test_one_plan_is_built_for_each_compute_capability_without_its_gpu(graph: onnx.ModelProto) -> None:
    plans = build_plans(graph, SETTINGS, ("8.6", "8.9", "12.0"))
    entries = [plan.entry(plan.file_name) for plan in plans]
    assert [entry.file for entry in entries] == [f"tensorrt-rtx-{name}.plan" for name in ("sm86", "sm89", "sm120")]
    assert [entry.compute_capability for entry in entries] == ["8.6", "8.9", "12.0"]
    assert len({plan.content for plan in plans}) == 3


def test_without_a_capability_the_plan_is_for_any_gpu_from_ampere_on(graph: onnx.ModelProto) -> None:
    entry = build(graph, BuildSettings("tensorrt-rtx", (1, 1, 1))).entry("a.plan")
    assert (entry.compute_capability, entry.gpu, entry.batch) == (None, None, (1, 1, 1))


def test_the_layer_table_covers_the_network_from_pixels_to_embeddings(graph: onnx.ModelProto) -> None:
    layers = layers_from_log(build(graph).layers)
    tensors = {tensor["Name"]: tensor for layer in layers for tensor in (*layer["Inputs"], *layer["Outputs"])}
    assert tensors["images"]["Dimensions"] == [-1, 96, 32, 3]
    assert tensors["images"]["Datatype"] == "UInt8"
    assert tensors["embeddings"]["Dimensions"] == [-1, graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value]
    assert layer_table.summary(layers, graph)["convolutions"] == {"Float": convolutions_of(graph)}


def test_residual_additions_are_fused_into_the_convolutions(graph: onnx.ModelProto) -> None:
    summary = layer_table.summary(layers_from_log(build(graph).layers), graph)
    assert summary["additions_in_convolutions"] == summary["additions"] > 0


def test_a_half_precision_graph_computes_its_convolutions_in_half(graph: onnx.ModelProto, ranges) -> None:
    from mgn_deploy.export.precision.half import to_half

    half = to_half(graph, "fp16", ranges)
    plan = build(half)
    summary = layer_table.summary(layers_from_log(plan.layers), half)
    assert summary["convolutions"] == {"Half": convolutions_of(graph)}
    assert summary["additions_in_convolutions"] == summary["additions"] > 0


def to_int8(graph: onnx.ModelProto, ranges: dict[str, TensorRange]) -> onnx.ModelProto:
    thresholds = {name: max(one.largest, 1e-8) for name, one in ranges.items()}
    return quantise(graph, ranges, thresholds, TENSORRT_RTX)


def test_an_int8_graph_computes_its_convolutions_in_int8_and_the_additions_inside_them(
    graph: onnx.ModelProto, ranges
) -> None:
    int8 = to_int8(graph, ranges)
    layers = layers_from_log(build(int8).layers)
    summary = layer_table.summary(layers, int8)
    assert summary["convolutions"] == {"Int8": convolutions_of(graph)}
    assert summary["additions_in_convolutions"] == summary["additions"] > 0
    written = {layer_table.data_type(one) for x in layers if x["LayerType"] == "correlation" for one in x["Outputs"]}
    assert written == {"Half"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_mirror_average_does_not_double_the_weights(graph: onnx.ModelProto, ranges, precision: str) -> None:
    graph = graph if precision == "fp32" else to_int8(graph, ranges)
    plan = build(graph).content
    weights = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer if len(tensor.dims) > 2]
    orders = [{one.tobytes(), one.reshape(len(one), one.shape[1], -1).swapaxes(1, 2).tobytes()} for one in weights]
    found = [sum(plan.count(content) for content in contents) for contents in orders]
    assert set(found) <= {0, 1}  # none where the plan has it in another order yet
    assert sum(found) > len(weights) / 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_with_instance_norms_builds(trace, crops: np.ndarray, precision: str) -> None:
    from mgn_deploy.config import ModelConfig
    from mgn_deploy.train.weights import new_model

    config = ModelConfig(
        backbone="resnet18", base_width=8, reduced_width=16, height=96, width=32, ibn="a", branches=(1,)
    )
    graph = trace(new_model(config, seed=1))
    assert any(node.op_type == "InstanceNormalization" for node in graph.graph.node)
    if precision == "int8":
        graph = to_int8(graph, measure_ranges(graph, crops))
    kind = {"fp32": "Float", "int8": "Int8"}[precision]
    assert layer_table.summary(layers_from_log(build(graph).layers), graph)["convolutions"] == {
        kind: convolutions_of(graph)
    }


def test_preparing_a_graph_for_the_parser_changes_no_value(graph: onnx.ModelProto, crops: np.ndarray) -> None:
    import onnxruntime

    prepared = prepare(graph)
    results = [
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"images": crops})[0]
        for content in (graph.SerializeToString(), prepared.content)
    ]
    assert (prepared.input_name, prepared.height, prepared.width) == ("images", 96, 32)
    np.testing.assert_array_equal(*results)


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


def test_a_cache_that_cannot_be_written_is_warned_of_and_the_plan_is_there(
    graph: onnx.ModelProto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mgn-deploy").write_text("in the way")
    plan = build(graph)
    assert plan.content
    assert not plan.cached
    assert "is not cached" in caplog.text
    assert "set XDG_CACHE_HOME" in caplog.text


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


def test_the_command_lines_batch_and_capabilities_are_read() -> None:
    assert parse_batch("1,32,64") == (1, 32, 64)
    assert parse_capabilities("8.6, 8.9,12.0,8.6") == ("8.6", "8.9", "12.0")


@pytest.mark.parametrize("text", ["", "1,2", "1,2,x", "2,1,4", "1,2,3,4", "1,8,4097"])
def test_a_batch_that_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="min"):
        parse_batch(text)


def test_building_and_running_import_no_pytorch() -> None:
    code = (
        "import sys, mgn_deploy.backends.tensorrt.builder, mgn_deploy.export.triton, "
        "mgn_deploy.backends.tensorrt.runner as backend\n"
        "backend.TensorRtRtxBackend.missing()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_are_read_from_the_builders_log() -> None:
    text = (
        "Layers:\nName: conv1 + relu, LayerType: correlation, Inputs: [ "
        "{ Name: x, Dimensions: [-1,3,8,8], Datatype: Int8, "
        "Format: (NHWC) Channel major format }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,4,8,8], "
        "Datatype: Half, "
        "Format: (Linear) Row major }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: relu]\n\n"
        "I/O Tensors:\n Name: x, IOMode: Input\n"
    )
    [layer] = layers_from_log(text)
    assert (layer["Name"], layer["LayerType"], layer["Constants"]) == ("conv1 + relu", "correlation", [])
    assert layer["Inputs"] == [
        {"Name": "x", "Dimensions": [-1, 3, 8, 8], "Datatype": "Int8", "Format": "(NHWC) Channel major format"}
    ]
    assert layer_table.fused_nodes(layer) == ["conv1", "relu"]


def test_layers_are_read_from_the_inspector() -> None:
    layers = layer_table.layers_from_inspector('{"Layers": [{"Name": "a", "LayerType": "CaskConvolution"}, "b"]}')
    assert [layer["Name"] for layer in layers] == ["a", "b"]


def test_a_generated_kernel_that_names_a_convolution_has_not_taken_the_addition_into_it() -> None:
    def layer(kind: str) -> dict[str, str]:
        return {"LayerType": kind, "Metadata": "[ONNX Layer: conv][ONNX Layer: add]"}

    assert layer_table.fused_with([layer("kgen")], ["add"], ["conv"]) == []
    assert layer_table.fused_with([layer("kgen"), layer("correlation")], ["add"], ["conv"]) == ["add"]
