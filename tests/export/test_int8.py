"""INT8 within a budget: the images, the method, the sweep; and the exports of each precision by the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import mgn_deploy
from PIL import Image

from mgn_deploy.backends.base import Backend
from mgn_deploy.backends.heads.cut import FEATURE_MAPS
from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.precision.calibration_images import read_calibration_images
from mgn_deploy.export.precision.int8 import agreement_drop, build_int8
from mgn_deploy.export.precision.profile import PROFILERS, block_milliseconds
from mgn_deploy.export.precision.quantise import conv_groups, quantise
from mgn_deploy.export.precision.ranges import measure_ranges
from mgn_deploy.export.precision.thresholds import thresholds
from mgn_deploy.export.proof.agreement import run_in_batches
from mgn_deploy.images.decode import read_crop
from mgn_deploy.train.weights import load_weights

OPENVINO = ENGINES["openvino"].placement


@pytest.fixture(scope="module")
def pixels(crops) -> np.ndarray:
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))])


@pytest.fixture
def open_graph(bundle_folder):
    manifest = Bundle.open(bundle_folder).manifest

    def open_graph(graph: onnx.ModelProto) -> Backend:
        return ENGINES["openvino"].load().open_graph(graph.SerializeToString(), manifest.model)

    return open_graph


def milliseconds(graph: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    return block_milliseconds(graph, images, "openvino")


# The budget


def test_the_method_with_the_least_error_is_taken_and_a_kept_budget_needs_no_sweep(weights, trace, pixels, open_graph):
    graph = trace(load_weights(weights))
    plain = trace(load_weights(weights), flip=False)
    drop = agreement_drop(pixels, run_in_batches(open_graph(graph), pixels))
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, drop, 100, milliseconds)
    plain_methods = {name for name in made.errors if not name.endswith("+bias")}
    assert plain_methods == {"max", "percentile", "mse", "entropy"}
    assert made.errors.keys() - plain_methods == {f"{min(plain_methods, key=made.errors.__getitem__)}+bias"}
    assert made.errors[made.method] == min(made.errors.values())
    assert 0 < made.errors[made.method] < 0.01
    assert (made.sweep, made.in_float) == ([], [])
    assert made.drop == pytest.approx(drop(open_graph(made.graph)), abs=2)


def test_the_block_that_int8_breaks_is_found_and_left_in_float(weights, trace, pixels, open_graph, said):
    """One channel of a block is a thousand times the others, so that one scale for the tensor rounds the others
    away."""
    model = load_weights(weights)
    block = model.trunk[4][1]
    for parameter in (block.bn1.weight, block.bn1.bias):
        parameter.data[0] *= 1000
    block.conv2.weight.data[:, 0] /= 1000
    graph, plain = trace(model), trace(model, flip=False)
    reference = run_in_batches(open_graph(graph), pixels)
    drop = agreement_drop(pixels, reference)
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, drop, 5, milliseconds)
    assert max(made.sweep, key=lambda row: row.error).block == "trunk.4.1"
    assert {row.block for row in made.sweep} == set(conv_groups(plain))
    rates = [row.error / max(row.milliseconds, 1e-3) for row in made.sweep]
    assert rates == sorted(rates, reverse=True)
    assert "trunk.4.1" in made.in_float
    assert len(made.in_float) < len(made.sweep)
    assert made.drop <= 5
    assert made.drop == drop(open_graph(made.graph))
    assert any("looking for the blocks that lose most" in sentence for sentence in said)
    for row in made.sweep:
        assert any(f"{row.block} alone in INT8: 1 - cosine {row.error:.1e}, saves" in sentence for sentence in said)


def test_a_budget_that_cannot_be_kept_is_one_sentence(weights, trace, pixels, open_graph):
    graph, plain = trace(load_weights(weights)), trace(load_weights(weights), flip=False)
    with pytest.raises(UserError, match=r"no INT8 graph loses at most 0\.5 points"):
        build_int8(graph, plain, pixels, OPENVINO, open_graph, lambda engine: 1.0, 0.5, milliseconds)


def test_of_blocks_that_err_alike_the_one_that_saves_less_time_goes_back_first(weights, trace, pixels, open_graph):
    """The first blocks' time is of the test: what is asked is the order."""
    graph, plain = trace(load_weights(weights)), trace(load_weights(weights), flip=False)
    names = conv_groups(plain)
    saved = {name: 10.0**-number for number, name in enumerate(names[:4])}

    def milliseconds(model, images):
        quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
        return {} if quantised else {name: saved.get(name, 1e6) for name in names}

    drops = iter([1.0, *[0.0] * 20])
    made = build_int8(graph, plain, pixels, OPENVINO, open_graph, lambda engine: next(drops), 0.5, milliseconds)
    assert [row.milliseconds for row in made.sweep if row.block in saved] == pytest.approx(
        sorted(saved.values()), rel=1e-6
    )
    assert made.in_float == [made.sweep[0].block]


@pytest.mark.parametrize("engine", PROFILERS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_profiler_has_a_time_of_every_block(weights, trace, pixels, engine, precision):
    graph = trace(load_weights(weights), flip=False)
    if precision == "int8":
        ranges = measure_ranges(graph, pixels, histograms=True)
        graph = quantise(graph, ranges, thresholds(ranges, "max"), ENGINES[engine].placement)
    found = block_milliseconds(graph, pixels[:4], engine)
    assert set(found) == set(conv_groups(graph))
    assert min(found.values()) > 0


def test_every_engine_that_runs_candidates_has_a_profiler():
    assert {row.calibrated_by for row in ENGINES.values() if row.placement} == set(PROFILERS)


@pytest.mark.parametrize("engine", [name for name, row in ENGINES.items() if row.placement])
def test_corrected_biases_bring_the_mean_of_every_convolutions_output_back(weights, trace, pixels, engine):
    """Weights of few levels, so that their rounding moves the means; pixels as they are, so that nothing else does."""
    graph = trace(load_weights(weights), flip=False)
    ranges = measure_ranges(graph, pixels, histograms=True)
    placement = replace(ENGINES[engine].placement, weight_levels=7)
    stem = conv_groups(graph)[0]
    others = [name for name in conv_groups(graph) if name != stem]
    name = next(node.output[0] for node in graph.graph.node if node.op_type == "Conv")
    means = []
    for correct in (None, False, True):
        made = graph
        if correct is not None:
            limits = thresholds(ranges, "max")
            made = quantise(graph, ranges, limits, placement, others, correct_bias=correct)
        exposed = onnx.ModelProto()
        exposed.CopyFrom(made)
        exposed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        session = onnxruntime.InferenceSession(exposed.SerializeToString(), providers=["CPUExecutionProvider"])
        means.append(session.run([name], {"images": pixels})[0].astype(np.float64).mean((0, 2, 3)))
    before, rounded, corrected = means
    assert np.abs(corrected - before).mean() < 0.3 * np.abs(rounded - before).mean()


def test_the_bias_of_a_grouped_convolution_is_corrected_too(pixels):
    """As in a ResNeXt; every weight is rounded down, so that each channel's mean moves."""
    weight = np.full((6, 1, 3, 3), 0.049, np.float32)
    weight[:, :, 1, 1] = 1
    nodes = [
        onnx.helper.make_node("Cast", ["images"], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["pixels", "trunk.0.weight", "bias"], ["map_0"], name="conv", group=3),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "grouped",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 96, 32, 3])],
        [onnx.helper.make_tensor_value_info("map_0", onnx.TensorProto.FLOAT, ["batch", 6, 94, 30])],
        [
            onnx.numpy_helper.from_array(weight, "trunk.0.weight"),
            onnx.numpy_helper.from_array(weight[:, 0, 0, 0], "bias"),
        ],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.metadata_props.add(key=FEATURE_MAPS, value="map_0")
    ranges = measure_ranges(model, pixels, histograms=True)
    limits, placement = thresholds(ranges, "max"), replace(OPENVINO, weight_levels=7)
    before, rounded, corrected = (
        onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        .run(["map_0"], {"images": pixels})[0]
        .mean((0, 2, 3))
        for made in (
            model,
            quantise(model, ranges, limits, placement),
            quantise(model, ranges, limits, placement, correct_bias=True),
        )
    )
    assert np.abs(corrected - before).max() < 0.1 * np.abs(rounded - before).min()


# The images


def test_the_same_images_are_drawn_each_time_and_from_every_camera_alike(crops, tmp_path, pixels, said):
    shutil.copytree(crops / "camera 1", tmp_path / "1")
    (tmp_path / "2").mkdir()
    for path in sorted((crops / "camera 2").iterdir())[:6]:
        shutil.copy(path, tmp_path / "2")
    first = read_calibration_images(tmp_path, 96, 32, pixels, count=12)
    again = read_calibration_images(tmp_path, 96, 32, pixels, count=12)
    assert np.array_equal(first.crops, again.crops)
    assert len(first.crops) == 12
    seconds = [read_crop(path, 96, 32).tobytes() for path in (tmp_path / "2").iterdir()]
    assert sum(crop.tobytes() in seconds for crop in first.crops) == 6
    assert "few" in said[0]


def test_broken_images_are_left_out(crops, tmp_path, pixels):
    folder = tmp_path / "images"
    shutil.copytree(crops, folder)
    (folder / "broken.jpg").write_bytes(b"no image")
    assert len(read_calibration_images(folder, 96, 32, pixels).crops) == 40


def test_nothing_to_calibrate_on_is_refused(tmp_path, pixels):
    (tmp_path / "note.txt").write_text("no image")
    with pytest.raises(UserError):
        read_calibration_images(tmp_path, 96, 32, pixels)
    for number in range(20):
        Image.new("RGB", (32, 96)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match=r"has 0 readable images that show something \(20 are of one colour\)"):
        read_calibration_images(tmp_path, 96, 32, pixels)


def test_few_readable_images_are_refused(crops, tmp_path, pixels):
    for path in sorted(crops.rglob("*.jpg"))[:9]:
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=r"has 9 readable images .*: INT8 is calibrated on at least 10"):
        read_calibration_images(tmp_path, 96, 32, pixels)


def test_images_of_one_colour_are_left_out_however_many_they_are(crops, tmp_path, pixels, said):
    """Few pictures among them would pass for a set with contrast."""
    for path in sorted(crops.rglob("*.jpg"))[:10]:
        shutil.copy(path, tmp_path)
    for number in range(30):
        Image.new("RGB", (32, 96), (number, 0, 0)).save(tmp_path / f"{number}.png")
    images = read_calibration_images(tmp_path, 96, 32, pixels)
    assert len(images.crops) == 10
    assert "30 calibration images of one colour are left out" in said


def test_activations_that_are_not_finite_are_one_sentence(weights, trace, pixels, open_graph):
    model = load_weights(weights)
    model.trunk[4][1].bn1.weight.data[0] = 3e38
    plain = trace(model, flip=False)
    with pytest.raises(UserError, match="is not finite on these images"):
        build_int8(plain, plain, pixels, OPENVINO, open_graph, lambda engine: 0.0, 0.5, milliseconds)


def test_images_that_look_unlike_the_proof_s_are_warned_of(crops, pixels, said):
    read_calibration_images(crops, 96, 32, pixels)
    assert not any("unlike" in warning for warning in said)
    read_calibration_images(crops, 96, 32, (pixels // 16 + 235).astype(np.uint8))
    assert any("look unlike the proof images (mean brightness" in warning for warning in said)


# The command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "engine", "proven"),
    [
        ("fp16", "openvino", {"openvino", "onnxruntime"}),
        ("bf16", "openvino", {"openvino"}),
        ("int8", "openvino", {"openvino"}),
        ("int8", "onnxruntime", {"onnxruntime"}),
        ("int8", "tensorrt-rtx", {"onnxruntime"}),
    ],
)
def test_export_in_each_precision(weights, crops, tmp_path, precision, engine, proven, embedder):
    out = tmp_path / "b"
    arguments = ("export", weights, "-o", out, "--precision", precision, "--proof-images", crops, "--json")
    if precision == "int8":
        arguments += ("--engine", engine, "--calib", crops, "--max-drop", 100)
    done = mgn_deploy(*arguments)
    assert done.exit_code == 0, done.stderr
    assert set(json.loads(done.stdout)["proofs"]) == proven
    bundle = Bundle.open(out)
    assert bundle.manifest.precision == precision
    assert bundle.id != embedder.bundle.id
    quantisation = bundle.manifest.quantisation
    if precision == "int8":
        assert (quantisation.engine, quantisation.images, quantisation.drop_of) == (engine, 40, "top-10 agreement")
        assert (out / "graph.onnx").stat().st_size < 0.5 * (embedder.bundle.folder / "graph.onnx").stat().st_size
    else:
        assert quantisation is None
    paths = sorted(crops.rglob("*.jpg"))[:8]
    expected = embedder.embed(paths)
    found = Embedder.open(out).embed(paths)
    assert (found * expected).sum(axis=1).min() > (0.98 if precision == "int8" else 0.9999)
    with pytest.raises(CannotRun, match="no proof for torch"):
        Embedder.open(out, "torch")
    Embedder.open_reference(out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--precision", "int4"), "'int4' is not one of"),
        (("--precision", "int8"), "INT8 needs images to calibrate on: --calib DIR"),
        (("--precision", "int8", "--calib", "none"), "none"),
        (("--precision", "int8", "--calib", ".", "--max-drop", "nan"), "--max-drop nan: points are from 0 to 100"),
        (("--precision", "int8", "--calib", ".", "--max-drop", "inf"), "--max-drop inf: points are from 0 to 100"),
        (("--max-drop", "1"), "--max-drop is about INT8"),
        (("--calib", "."), "--calib is of no use to fp32"),
        (
            ("--precision", "int8", "--calib", ".", "--engine", "tflite"),
            "'tflite' is not one of",
        ),
    ],
)
def test_bad_arguments_are_one_sentence_and_nothing_is_written(weights, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = mgn_deploy("export", weights, "-o", "b", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
