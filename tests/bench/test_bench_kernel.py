"""The heads' bench as far as no GPU is needed: that its contenders compute the same, its arithmetic, its rows."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from emulator.reference import embed, stripe_pool_reduce

from mgn_deploy.bench.kernel.cases import DTYPES, OUTPUTS, Case, Inputs, all_cases, finish, random_inputs, right_answer
from mgn_deploy.bench.kernel.contenders import Contender, Heads, LeanHeads, makers, module, torch_op
from mgn_deploy.bench.kernel.measure import check, checked, floor_of, measured
from mgn_deploy.bench.timing import Clock, Limits, in_turns
from mgn_deploy.errors import CannotRun

torch.set_num_threads(1)
LIMITS = Limits(by="nobody", copy_bytes_per_second=2e12, operations_per_second=dict.fromkeys(DTYPES, 5e14))


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
        assert "failed" not in found
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
    seconds, why = floor_of(case, LIMITS.model_copy(update={"operations_per_second": slow}))
    assert why == bound
    assert seconds == max(case.bytes / 2e12, case.operations / 2e12)


def test_every_type_layout_output_and_batch_is_a_case_once():
    cases = all_cases((1, 2, 512))
    assert len(cases) == len(set(cases)) == 3 * 2 * 2 * 3
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
    assert re.match(message, found["failed"])


@pytest.mark.parametrize(
    ("dtype", "roundings", "most"),
    [("float32", 1, 1e-5), ("float16", 0, 1e-5), ("float16", 1, 1e-5 + 2**-11), ("bfloat16", 3, 1e-5 + 3 * 2**-8)],
)
def test_the_measure_is_1e_5_and_what_the_roundings_to_16_bits_move(dtype, roundings, most):
    case = small(dtype)
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    for factor, wrong in ((0.99, False), (1.01, True)):
        result = expected * (1 + factor * most)
        assert (
            "failed" in check(Contender(lambda result=result: result, roundings=roundings), expected, case)
        ) == wrong


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
    assert check(lazy, expected, case)["failed"].startswith("not every number of the result was written")


def refuse(error):
    raise error


@pytest.fixture(scope="module")
def clock():
    return Clock("cpu")


@pytest.fixture
def rows(clock):
    """Of one case, by contender: right, wrong, broken and not here."""
    case = small("float16", "nhwc")
    inputs = random_inputs(case, "cpu", 3)
    ways = {
        "kernel_graph": lambda: torch_op(case, inputs),
        "eager": lambda: module(Heads(case, inputs), inputs),
        "eager_graph": lambda: Contender(lambda: torch.zeros(3, 128)),
        "compiled_graph": lambda: refuse(RuntimeError("no compiler\nhere")),
        "kernel_rows": lambda: refuse(CannotRun("NVRTC is not installed")),
    }
    return {row["contender"]: row for row in measured(case, inputs, ways, clock, LIMITS, turns=4)}


def test_a_contender_that_fails_or_is_wrong_is_a_row_and_costs_no_other_its_times(rows):
    assert rows["compiled_graph"]["failed"] == "RuntimeError: no compiler here"
    assert rows["eager_graph"]["failed"] == "the error 1 is above 0.0015"
    assert "cold_us" not in rows["eager_graph"]
    assert rows["kernel_rows"]["left_out"] == "NVRTC is not installed"
    for name in ("kernel_graph", "eager"):
        assert rows[name]["cold_us"] > 0
        assert rows[name]["warm_quartiles_us"][0] <= rows[name]["warm_us"] <= rows[name]["warm_quartiles_us"][1]


def test_figures_follow_from_the_time(rows):
    row, case = rows["kernel_graph"], small("float16", "nhwc")
    assert row["of_copy"] == pytest.approx(case.bytes / row["cold_us"] * 1e6 / 2e12, abs=1e-4)
    assert row["over_floor"] == pytest.approx(row["cold_us"] / row["floor_us"], rel=0.2)


def test_rows_are_strict_json(rows):
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_a_kernel_that_gives_other_bits_the_second_time_has_failed(clock):
    case = small()
    expected = right_answer(case, random_inputs(case, "cpu", 2))
    spoilt = result_of(lambda results: results[1].add_(1e-7), expected.float())
    inputs = random_inputs(case, "cpu", 2)
    (row,) = measured(case, inputs, {"kernel": lambda: spoilt}, clock, LIMITS, turns=2)
    assert row["failed"] == "two runs differ"


def test_a_run_that_breaks_while_it_is_timed_loses_nobody_elses_check(clock):
    case = small()
    inputs = random_inputs(case, "cpu", 3)
    right, left = module(Heads(case, inputs), inputs).run, [2]

    def twice():
        left[0] -= 1
        return right() if left[0] >= 0 else refuse(RuntimeError("an illegal memory access"))

    ways = {"kernel": lambda: Contender(right), "eager": lambda: Contender(twice)}
    kernel, eager, broken = measured(case, inputs, ways, clock, LIMITS, turns=2)
    assert broken["failed"] == "while timing: RuntimeError: an illegal memory access"
    assert kernel["bit_equal"] is eager["bit_equal"] is True


def test_contenders_take_turns_in_another_order_each_round():
    order = []
    tasks = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    results = in_turns(tasks, until=0.0, fewest=8, most=8, seed=1)
    rounds = ["".join(order[at : at + 3]) for at in range(0, 24, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 2
    assert {name: len(each) for name, each in results.items()} == dict.fromkeys("abc", 8)


def test_no_round_is_begun_that_would_end_after_the_time():
    assert {len(each) for each in in_turns({"a": lambda: 1}, until=0.0, fewest=1, most=9, seed=0).values()} == {1}


def test_without_a_gpu_tritons_rival_says_what_it_needs():
    pytest.importorskip("triton")
    case = small("float16", "nhwc")
    inputs = random_inputs(case, "cpu", 1)
    rows = {row["contender"]: row for row, _ in checked(case, inputs, makers(case, inputs))}
    assert set(rows) == {"torch_op", "eager", "lean", "triton"}
    assert rows["triton"]["left_out"] == "Triton needs a GPU, or TRITON_INTERPRET=1 before it is loaded"


def test_cudnn_may_time_its_algorithms_for_the_rivals(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    makers(small(), random_inputs(small(), "cpu", seed=0))
    assert torch.backends.cudnn.benchmark
