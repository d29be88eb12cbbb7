"""`bench.kernel` as far as no GPU is needed: that its contenders compute the same, its arithmetic, its results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mgn_deploy.bench.gpu import suite as gpu_suite
from mgn_deploy.bench.kernel import __main__ as kernel
from mgn_deploy.bench.kernel import run as kernel_run
from mgn_deploy.bench.kernel.cases import DTYPES, Case, Inputs, all_cases, finish, random_inputs, right_answer
from mgn_deploy.bench.kernel.clock import in_turns
from mgn_deploy.bench.kernel.contenders import NAMES, Contender, Heads, LeanHeads, check, makers, module, torch_op
from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.errors import CannotRun
from mgn_deploy.kernels.reference import embed, stripe_pool_reduce

torch.set_num_threads(1)
LIMITS = {"copy_bytes_per_second": 2e12, "operations_per_second": dict.fromkeys(DTYPES, 5e14), "nothing_us": 1.0}
OUTPUTS = ("features", "mirror_embeddings")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def small(dtype="float32", layout="nchw", output="mirror_embeddings", images=3):
    return Case(dtype, layout, output, images, 64, 16, (1, 2, 3), ((3, 2), (4, 3), (6, 3)))


def definition(case, inputs):
    maps = [map_.double().numpy() for map_ in inputs.maps]
    weight, bias = inputs.weight.double().numpy().transpose(0, 2, 1), inputs.bias.double().numpy()[:, None]
    features = stripe_pool_reduce(maps, case.branches, weight, bias)
    return features if case.output == "features" else embed(features, True)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_contender_is_held_against_the_definition(dtype, layout, output):
    case = small(dtype, layout, output)
    inputs = random_inputs(case, "cpu", seed=1)
    assert inputs.maps[1].is_contiguous(memory_format=torch.channels_last) == (layout == "nhwc")
    expected = right_answer(case, inputs)
    np.testing.assert_allclose(expected.numpy(), definition(case, inputs), rtol=0, atol=1e-12)
    for contender in (
        module(Heads(case, inputs), inputs),
        module(LeanHeads(case, inputs), inputs),
        torch_op(case, inputs),
    ):
        found = check(contender, expected, case)
        assert "wrong" not in found
        assert found["error"] < {"float32": 1e-6, "float16": 6e-4, "bfloat16": 5e-3}[dtype]


def test_the_eager_heads_are_those_of_the_network(weights):
    from mgn_deploy.train.model import fold_batch_norms
    from mgn_deploy.train.weights import load_weights

    model = fold_batch_norms(load_weights(weights).eval())
    maps = model.feature_maps(torch.randn(4, 3, 96, 32, generator=torch.Generator().manual_seed(0)))
    reductions = [reduction[0] for branch in model.branches for reduction in branch.reductions]
    weight = torch.stack([conv.weight[:, :, 0, 0] for conv in reductions])
    inputs = Inputs(maps, weight, torch.stack([conv.bias for conv in reductions]))
    branches, sizes = model.config.branches, tuple(map_.shape[2:] for map_ in maps)
    case = Case("float32", "nchw", "features", 4, maps[0].shape[1], weight.shape[1], branches, sizes)
    expected = torch.cat([v for b, m in zip(model.branches, maps, strict=True) for v in b.reduce(b.pool(m))], dim=1)
    for heads in (Heads, LeanHeads):
        torch.testing.assert_close(heads(case, inputs)(*maps), expected, rtol=1e-4, atol=1e-5)


def test_the_average_and_norm_are_those_of_the_embedding(weights):
    from mgn_deploy.train.model import Embedding
    from mgn_deploy.train.weights import load_weights

    model = load_weights(weights).eval()
    images = torch.randint(0, 256, (2, 96, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embedding = Embedding(model)
    found = finish(model(embedding.normalise(images)), "mirror_embeddings")
    torch.testing.assert_close(found, embedding(images))


def test_each_map_is_counted_once():
    maps, weight, bias = 2048 * (12 * 4 + 24 * 8 + 24 * 8), 8 * 256 * 2048, 8 * 256
    assert Case("float16", "nhwc", "features", 1).bytes == 2 * maps + 2 * weight + 4 * bias + 2 * 2048
    assert Case("float32", "nhwc", "features", 3).bytes == 3 * 4 * maps + 4 * weight + 4 * bias + 3 * 4 * 2048
    assert (
        Case("bfloat16", "nchw", "mirror_embeddings", 8).bytes == 16 * 2 * maps + 2 * weight + 4 * bias + 8 * 4 * 2048
    )


def test_a_multiply_add_is_two_operations_and_mirrors_are_rows():
    assert Case("float16", "nhwc", "features", 1).operations == 2 * 8 * 256 * 2048
    assert Case("float16", "nhwc", "mirror_embeddings", 4).operations == 8 * 2 * 8 * 256 * 2048


@pytest.mark.parametrize(("images", "bound"), [(1, "bytes"), (512, "operations")])
def test_the_floor_is_the_larger_of_moving_and_reckoning(images, bound):
    case, slow = Case("float32", "nchw", "features", images), {"float32": 2e12}
    seconds, why = kernel_run.floor_of(case, {**LIMITS, "operations_per_second": slow})
    assert why == bound
    assert seconds == max(case.bytes / 2e12, case.operations / 2e12)


def test_every_type_layout_output_and_batch_is_a_case_once():
    cases = all_cases()
    assert len(cases) == len(set(cases)) == 3 * 2 * 2 * 10
    assert {case.images for case in cases} == {1, 2, 4, 8, 16, 32, 64, 128, 256, 512}
    assert cases[0] == Case("float16", "nhwc", "mirror_embeddings", 1)


def result_of(spoil, value):
    """A contender that gives a right answer but for what `spoil` does to it."""
    results = [value.clone(), value.clone()]
    spoil(results)
    return Contender(lambda: results.pop(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda results: results[0][0].fill_(torch.nan), "not every number"),
        (lambda results: results[0].mul_(1.001), "the error 0.001 is above 1e-05"),
        (lambda results: results.__setitem__(0, results[0][:1]), r"the result is \[1, 128\], not \[3, 128\]"),
    ],
)
def test_a_wrong_result_is_told(spoil, message):
    case = small()
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    found = check(result_of(spoil, expected.float()), expected, case)
    assert re.match(message, found["wrong"])


@pytest.mark.parametrize(
    ("dtype", "roundings", "most"),
    [("float32", 1, 1e-5), ("float16", 0, 1e-5), ("float16", 1, 1e-5 + 2**-11), ("bfloat16", 3, 1e-5 + 3 * 2**-8)],
)
def test_the_measure_is_1e_5_and_what_the_roundings_to_16_bits_move(dtype, roundings, most):
    case = small(dtype)
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    for factor, wrong in ((0.99, False), (1.01, True)):
        result = expected * (1 + factor * most)
        assert ("wrong" in check(Contender(lambda result=result: result, roundings=roundings), expected, case)) == wrong


@pytest.mark.parametrize(("output", "roundings"), [("features", 1), ("mirror_embeddings", 2)])
def test_the_op_is_held_to_as_many_roundings_as_it_makes(output, roundings):
    case = small("float16", "nhwc", output)
    assert torch_op(case, random_inputs(case, "cpu", 1)).roundings == roundings


def test_other_bits_on_the_second_run_are_told():
    case = small()
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    spoilt = result_of(lambda results: results[1].add_(1e-7), expected.float())
    assert check(spoilt, expected, case)["bit_equal"] is False


def test_what_was_not_written_is_poison():
    case = small()
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    result = expected.float()
    lazy = Contender(lambda: result, lambda: result.fill_(torch.nan))
    assert check(lazy, expected, case)["wrong"].startswith("not every number of the result was written")


def wall_clock(run, cold):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def refuse(error):
    raise error


@pytest.fixture
def result():
    """A run's result with one case measured by the wall clock: contenders right, wrong, broken and not here."""
    case = small("float16", "nhwc")
    inputs = random_inputs(case, "cpu", 3)
    ways = {
        "kernel": lambda: torch_op(case, inputs),
        "kernel_graph": lambda: torch_op(case, inputs),
        "lean_compiled_graph": lambda: module(LeanHeads(case, inputs), inputs),
        "eager": lambda: module(Heads(case, inputs), inputs),
        "eager_graph": lambda: Contender(lambda: torch.zeros(3, 128)),
        "compiled_graph": lambda: refuse(RuntimeError("no compiler\nhere")),
        "tensorrt": lambda: refuse(CannotRun("TensorRT is not installed")),
    }
    left_out: dict[str, str] = {}
    row = kernel_run.measure_case(case, inputs, ways, left_out, wall_clock, turns=4)
    kernel_run.add_figures(row, case, LIMITS)
    kernel_run.add_share(row, {"rows": 6, "eager_us": 2e6, "graph_us": 1e6})
    failed = {**kernel_run.identity(small("float32")), "failed": "OutOfMemoryError: too little"}
    return {
        **{
            "machine": {"gpu": "a CPU"},
            "ceilings": LIMITS,
            "left_out": left_out,
            "not_begun": ["float32 nchw features 2"],
        },
        "cases": [{**row, "images": 8}, failed],
    }


def test_a_contender_that_fails_or_is_wrong_is_recorded_and_costs_no_other_its_times(result):
    found = result["cases"][0]["contenders"]
    assert found["compiled_graph"] == {"failed": "RuntimeError: no compiler here"}
    assert found["eager_graph"]["wrong"] == "the error 1 is above 0.0015"
    assert "cold_us" not in found["eager_graph"]
    assert result["left_out"] == {"tensorrt": "TensorRT is not installed"}
    assert "tensorrt" not in found
    for name in ("kernel", "eager"):
        assert found[name]["cold_us"] > 0
        assert found[name]["warm_quartiles_us"][0] <= found[name]["warm_us"] <= found[name]["warm_quartiles_us"][1]


def test_a_run_that_breaks_while_it_is_timed_loses_nobody_elses_check():
    case = small()
    inputs = random_inputs(case, "cpu", 3)
    right, left = module(Heads(case, inputs), inputs).run, [2]

    def twice():
        left[0] -= 1
        return right() if left[0] >= 0 else refuse(RuntimeError("an illegal memory access"))

    ways = {"kernel": lambda: Contender(right), "eager": lambda: Contender(twice)}
    row = kernel_run.measure_case(case, inputs, ways, {}, wall_clock, turns=2)
    assert row["failed"] == "while timing: RuntimeError: an illegal memory access"
    assert {name: found["bit_equal"] for name, found in row["contenders"].items()} == {"kernel": True, "eager": True}


def test_figures_follow_from_the_time(result):
    row = result["cases"][0]
    found, case = row["contenders"]["kernel"], small("float16", "nhwc")
    assert found["gb_per_second"] == pytest.approx(case.bytes / found["cold_us"] / 1e3, abs=0.01)
    assert found["of_copy"] == pytest.approx(case.bytes / found["cold_us"] * 1e6 / 2e12, abs=1e-4)
    assert found["over_floor"] == pytest.approx(found["cold_us"] / row["floor_us"], rel=0.2)
    assert found["of_network"] == pytest.approx(found["cold_us"] / 1e6, abs=1e-5)


def test_the_result_is_strict_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_table_has_the_graphed_kernel_beside_its_graphed_rivals_and_says_what_is_missing(result):
    title, rows = kernel.table(result)
    assert title.startswith("a CPU: copy 2000 GB/s")
    assert title.endswith("in CUDA graphs")
    (cells,) = rows
    shown = dict(zip([*kernel.COLUMNS, *kernel.RIVALS.values()], cells, strict=True))
    found = result["cases"][0]["contenders"]
    assert (shown["case"], shown["images"]) == ("float16 nhwc mirror", "8")
    ours = found["kernel_graph"]
    assert (shown["kernel us"], shown["x floor"]) == (f"{ours['cold_us']:.1f}", f"{ours['over_floor']:.2f}")
    assert (shown["of copy"], shown["share"]) == (f"{ours['of_copy']:.0%}", f"{ours['of_network']:.1%}")
    assert shown["lean comp."] == f"{found['lean_compiled_graph']['cold_us'] / ours['cold_us']:.1f}x"
    assert shown["eager, no graph"] == f"{found['eager']['cold_us'] / ours['cold_us']:.1f}x"
    assert (shown["eager"], shown["compiled"]) == ("-", "-")
    assert kernel.remarks(result) == [
        "tensorrt is left out: TensorRT is not installed",
        "1 cases were not begun: --minutes were over, or the GPU was lost",
        "float16 nhwc mirror_embeddings 8, eager_graph: the error 1 is above 0.0015",
        "float16 nhwc mirror_embeddings 8, compiled_graph: RuntimeError: no compiler here",
        "float32 nchw mirror_embeddings 3: OutOfMemoryError: too little",
    ]


def test_a_contender_that_is_left_out_is_not_asked_again():
    case = small()
    ways = {"tensorrt": lambda: pytest.fail("asked again")}
    row = kernel_run.measure_case(case, random_inputs(case, "cpu", 1), ways, {"tensorrt": "no"}, wall_clock, turns=2)
    assert row["contenders"] == {}


def test_contenders_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = in_turns(runs, wall_clock, 3, cold=True)
    assert order == list("abababab")
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_tensorrts_graph_is_the_definition(layout, output):
    onnxruntime = pytest.importorskip("onnxruntime")
    from mgn_deploy.bench.kernel.tensorrt import heads_graph

    case = small("float32", layout, output)
    inputs = random_inputs(case, "cpu", 4)
    graph = heads_graph(case, inputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    maps = [map_.permute(0, 2, 3, 1) if layout == "nhwc" else map_ for map_ in inputs.maps]
    feed = {value.name: map_.contiguous().numpy() for value, map_ in zip(graph.graph.input, maps, strict=True)}
    np.testing.assert_allclose(session.run(None, feed)[0], definition(case, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorrt_rtx_builds_the_heads_and_says_for_which_gpus_it_does_not(dtype):
    pytest.importorskip("tensorrt_rtx")
    from mgn_deploy.bench.kernel.tensorrt import build_plan, heads_graph

    case = small(dtype, "nhwc")
    graph = heads_graph(case, random_inputs(case, "cpu", 4))
    assert len(build_plan(graph, "tensorrt-rtx", "8.9")) > 1000
    with pytest.raises(CannotRun, match=r"builds for compute capability .*8\.9.*, not for 3\.5"):
        build_plan(graph, "tensorrt-rtx", "3.5")


@pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys, tmp_path):
    assert kernel.main(["--out", str(tmp_path / "kernel.json")]) == 2
    written = capsys.readouterr()
    assert written.err.startswith("the kernel is measured on a GPU: no NVIDIA driver or GPU was found")
    assert len(written.err.splitlines()) == 1
    assert not written.out
    assert not list(tmp_path.iterdir())


def test_the_suite_imports_the_source_tree_under_its_one_name(tmp_path):
    environment = gpu_suite.prepare(tmp_path)
    names = ("mgn_deploy.errors", "mgn_deploy.kernels.plan", "mgn_deploy.train.recipe", "mgn_deploy.bench.gpu.suite")
    program = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    files = done.stdout.splitlines()
    assert len(files) == len(names)
    assert all(file.startswith(str(tmp_path / "site")) for file in files)


def runs_on(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_stage_past_its_limit_is_ended_with_all_that_it_started(tmp_path):
    log = tmp_path / "log"
    for seconds in (0.5, 5, 50):  # a busy machine takes its time to start them
        command = ["sh", "-c", "sleep 600 & echo $!; wait"]
        result = gpu_suite.run_limited(command, os.environ, tmp_path, log, seconds)
        assert (result["state"], result["exit"]) == ("out of time", None)
        if result["last"]:
            break
    else:
        pytest.fail("it never said what it had started")
    deadline = time.monotonic() + 60
    while runs_on(result["last"]):
        assert time.monotonic() < deadline, "its child runs on"
        time.sleep(0.02)


def test_the_suite_counts_what_passed_failed_and_was_skipped_for_which_reason(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.parametrize('one', [1, 2])\n"
        "def test_not_here(one): pytest.skip('needs a GPU')\n"
    )
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    monkeypatch.chdir(tmp_path)
    found = gpu_suite.run_pytest(str(tmp_path))
    assert [found[key] for key in ("exit", "passed", "failed", "skipped")] == [1, 1, 1, 3]
    assert found["reasons"].pop("needs a GPU") == 2
    ((reason, count),) = found["reasons"].items()
    assert "could not import 'no_such_module'" in reason
    assert count == 1


def test_the_suite_takes_no_tests_and_a_pytest_that_breaks_down_for_none_passed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, code in (([str(tmp_path)], 0), (["no/such/file.py"], 4)):
        found = gpu_suite.run_pytest(*arguments)
        assert (found["exit"], found["passed"], found["failed"]) == (code, 0, 0)


def test_the_suite_finds_the_tests_that_need_a_gpu_in_all_folders():
    folders = {path.parent.name for path in gpu_suite.gpu_test_files()}
    assert {"kernels", "backends"} <= folders


def test_the_sanitizers_run_the_operator_in_every_type_and_layout_on_both_paths():
    command = [*gpu_suite.PYTEST, *gpu_suite.SANITIZED, "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    collected = {line.partition("[")[2] for line in done.stdout.splitlines() if "::" in line}
    types, layouts, batches = ("dtype0", "dtype1", "dtype2"), ("True", "False"), ("2]", "9]")
    features = {f"{dtype}-max-{last}-{n}" for dtype in types for last in layouts for n in batches}
    assert collected == features | {f"{dtype}-2-mirror_embeddings]" for dtype in types}


@pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")
def test_the_suite_goes_on_where_a_stage_cannot_run(tmp_path, capsys):
    script = str(Path(gpu_suite.__file__).resolve())
    command = [sys.executable, script, "--out", str(tmp_path), "--stages", "engines,bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    states = json.loads((tmp_path / "suite.json").read_text())
    assert [state["state"] for state in states.values()] == ["cannot run here"] * 2
    for state in states.values():
        assert "no NVIDIA driver or GPU was found" in state["last"]


def test_every_contender_is_explained():
    case = small()
    ways = makers(case, random_inputs(case, "cpu", 1))
    assert {*ways, "tensorrt"} == set(NAMES)
    assert set(kernel.RIVALS) < set(ways)
