"""`mgn-deploy bench`: engines x bundles x batches as rows, their JSON and page, and how two results compare."""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace

import pytest
from conftest import mgn_deploy
from short_runs import short

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.bench import contenders, timing
from mgn_deploy.bench import page as page_module
from mgn_deploy.bench.compare import compare
from mgn_deploy.bench.contenders import operations
from mgn_deploy.bench.environment import Meter, Noise
from mgn_deploy.bench.page import page, table
from mgn_deploy.bench.result import Result, read_result
from mgn_deploy.bench.speed import measure
from mgn_deploy.bench.timing import limits
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.errors import CannotRun, GateFailed, UserError


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    from mgn_deploy.datasets.drawn import draw_market1501

    folder = tmp_path_factory.mktemp("people")
    draw_market1501(folder, train_identities=1, test_identities=4)
    return folder


@pytest.fixture(scope="module")
def result(bundle_folder, crops, people) -> Result:
    engines = ["onnxruntime", "tensorrt"]
    with short(rounds=4):
        return measure(
            [bundle_folder], engines=engines, batches=[1, 4], images=crops, count=16, data=f"folder:{people}", minutes=4
        )


def row_of(result, engine, batch):
    (row,) = [row for row in result.rows if (row.engine, row.batch) == (engine, batch)]
    return row


def test_every_engine_and_batch_is_a_row_and_what_cannot_run_says_why(result):
    engines = ("onnxruntime", "torch", "tensorrt")
    assert {(row.engine, row.batch) for row in result.rows} == {(name, batch) for name in engines for batch in (1, 4)}
    assert "tensorrt" in row_of(result, "tensorrt", 4).not_measured["engine"]
    assert row_of(result, "tensorrt", 4).pixels is None


@pytest.mark.parametrize(("engine", "batch"), [("onnxruntime", 1), ("onnxruntime", 4), ("torch", 4)])
def test_a_row_has_latencies_rates_memory_and_accuracy_of_one_engine(result, engine, batch, bundle_folder):
    row = row_of(result, engine, batch)
    for latency in (row.pixels, row.image_bytes):
        assert 0 < latency.p50.value <= latency.p90.value <= latency.p99.value <= latency.p999.value
        assert latency.calls >= len(latency.rounds.rounds) >= 1
    assert len(row.offline.rounds) == len(row.pixels.rounds.rounds)
    assert row.offline.low <= row.offline.median <= row.offline.high
    assert row.images % batch == 0
    assert row.bundle_id == Bundle.open(bundle_folder).id
    assert 0 < row.accuracy.mAP <= 1
    assert row.of_matrix_rate > 0
    assert row.host_bytes >= 0


def test_a_batch_that_an_engine_breaks_at_is_a_row_and_the_others_are_measured(bundle_folder, crops, monkeypatch):
    real = OnnxRuntimeBackend.__call__

    def call(self, images):
        if len(images) == 4:
            raise RuntimeError("no memory\nleft")
        return real(self, images)

    monkeypatch.setattr(OnnxRuntimeBackend, "__call__", call)
    chosen = {"engines": ["onnxruntime"], "images": crops, "count": 4, "reference": False}
    with short(rounds=1):
        result = measure([bundle_folder], batches=[1, 4], minutes=4, **chosen)
    assert row_of(result, "onnxruntime", 1).offline.median > 0
    assert row_of(result, "onnxruntime", 4).not_measured["engine"] == "RuntimeError: no memory left"
    with pytest.raises(CannotRun, match="onnxruntime: RuntimeError: no memory left"):
        measure([bundle_folder], batches=[4], **chosen)


def test_embed_and_the_reference_are_ratios_of_the_same_rounds(result):
    ours, torch = row_of(result, "onnxruntime", 4), row_of(result, "torch", 4)
    ratios = sorted(a / b for a, b in zip(ours.offline.rounds, torch.offline.rounds, strict=True))
    assert ratios[0] <= ours.over_reference + 1e-3
    assert ours.over_reference <= ratios[-1] + 1e-3
    assert min(ours.embed.rounds) > 0
    shares = sorted(a / b for a, b in zip(ours.embed.rounds, ours.offline.rounds, strict=True))
    assert shares[0] - 1e-3 <= ours.embed_of_offline <= shares[-1] + 1e-3
    assert torch.embed is None


def test_what_is_null_has_a_reason(result):
    row = row_of(result, "onnxruntime", 1)
    for name in ("server", "gpu_ms"):
        assert getattr(row, name) is None
        assert row.not_measured[name]


def test_the_json_is_read_back_and_names_machine_and_packages(result, tmp_path):
    (tmp_path / "bench.json").write_text(result.model_dump_json())
    assert read_result(tmp_path) == result
    assert result.environment.hardware.cpu
    assert {"onnxruntime", "torch"} <= set(result.environment.packages)
    assert result.limits.operations_per_second["float32"] > 1e8
    assert result.limits.copy_bytes_per_second > 1e8


def test_the_page_needs_nothing_else_and_shows_every_row_and_the_pareto_front(result):
    html = page(result)
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    for row in result.rows:  # the model, which all have, is in the head
        assert f"<td>{row.name.removeprefix(f'{row.model} ')}</td>" in html
    assert f"{result.models}; {result.date}" in html
    assert html.count("<circle") == 4
    assert 'class="front"' in html
    points = page_module._pareto(result.rows)["points"]
    assert all(f"<li>{point['name']}: {point['x']:.2f} ms" in html for point in points)


def test_labels_of_points_beside_each_other_are_above_each_other(result):
    rows = [row.model_copy(deep=True) for row in result.rows if row.accuracy]
    for row, milliseconds in zip(rows, (1.0, 1.01, 1.02, 2.0), strict=True):
        row.batch, row.pixels.p50.value = 1, milliseconds
    assert [point["level"] for point in page_module._pareto(rows)["points"]] == [0, 1, 2, 0]


def test_names_in_the_page_are_escaped(result):
    odd = result.model_copy(deep=True, update={"images": "<b>&"})
    assert "&lt;b&gt;&amp;" in page(odd)


def test_columns_without_a_figure_are_left_out(result):
    columns, rows = table(result)
    assert "server/s" not in columns
    assert "mAP" in columns
    assert {len(row) for row in rows} == {len(columns)}


def test_the_operations_are_those_of_the_convolutions(weights, bundle_folder):
    import torch

    from mgn_deploy.train.weights import load_weights

    counted = []
    model = load_weights(weights).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, out: counted.append(2 * out.numel() * m.weight[0].numel()) if out.shape[2] > 1 else None
            )
    model(torch.zeros(1, 3, 96, 32))
    assert operations(Bundle.open(bundle_folder)) == pytest.approx(2 * sum(counted), rel=0.01)


def timed(patch, seconds):
    """The real engine, by a clock that each of its calls moves on by this long, give or take a little: a busy machine's
    own delays would be as long as what is to be told."""
    real, now, jitter = OnnxRuntimeBackend.__call__, [0.0], random.Random(0)

    def call(self, images):
        now[0] += seconds * jitter.gauss(1, 0.005)
        return real(self, images)

    patch.setattr(OnnxRuntimeBackend, "__call__", call)
    for module in (timing, contenders):
        patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic))


@pytest.fixture(scope="module")
def slowed(bundle_folder, crops):
    """Results of an engine and of the same slowed by 10%; what others do to this machine is not what is tested."""
    results = []
    limits("cpu")  # by the real clock
    for seconds in (0.1, 0.11):
        with short(rounds=12) as patch:
            timed(patch, seconds)
            patch.setattr(Meter, "noise", lambda self, variation: Noise(variation=variation))
            results.append(
                measure([bundle_folder], engines=["onnxruntime"], batches=[1], images=crops, count=4, minutes=4,
                        reference=False)
            )  # fmt: skip
    return results


def test_a_run_compared_with_itself_says_same(slowed, result):
    """Also of two bundles whose rows have one name."""
    two = slowed[0].model_copy(update={"rows": [one.rows[0] for one in slowed]})
    for one in (*slowed, two, result):
        assert {compared.verdict for compared in compare(one, one)} == {"SAME"}


def test_an_engine_slowed_by_a_tenth_says_slower_and_the_other_way_round_faster(slowed, tmp_path):
    old, new = slowed
    forth = {one.figure: one.verdict for one in compare(old, new)}
    assert forth["latency ms"] == forth["offline images/s"] == forth["embed images/s"] == "SLOWER"
    back = {one.figure: one for one in compare(new, old)}
    assert back["latency ms"].verdict == "FASTER"
    assert back["latency ms"].speed == pytest.approx(1.1, abs=0.01)
    for name, one in (("old.json", old), ("new.json", new)):
        (tmp_path / name).write_text(one.model_dump_json())
    done = mgn_deploy("bench", "compare", tmp_path / "old.json", tmp_path / "new.json", "--json")
    assert done.exit_code == GateFailed.exit_code
    assert "slower: resnet18 MGN 96x32 fp32, onnxruntime, batch 1 (latency ms" in done.stderr
    assert {one["verdict"] for one in json.loads(done.stdout)} >= {"SLOWER"}


@pytest.mark.parametrize(("rounds", "disturbed"), [([10.0, 10.1, 10.2], False), ([10.0] * 6, True)])
def test_a_difference_of_few_rounds_or_under_noise_is_unsure(slowed, rounds, disturbed):
    from mgn_deploy.bench.timing import spread

    old, new = slowed[0].model_copy(deep=True), slowed[0].model_copy(deep=True)
    for one, factor in ((old, 1.0), (new, 0.8)):
        one.rows[0].offline = spread([factor * rate for rate in rounds])
        one.rows[0].noise = Noise(disturbed=disturbed)
    assert {one.figure: one.verdict for one in compare(old, new)}["offline images/s"] == "UNSURE"


def test_results_of_other_machines_are_refused(slowed):
    hardware = slowed[0].environment.hardware.model_copy(update={"instruction_sets": ("avx2",)})
    other = slowed[0].environment.model_copy(update={"hardware": hardware})
    with pytest.raises(UserError, match="different machines"):
        compare(slowed[0], slowed[0].model_copy(update={"environment": other}))


def test_files_that_are_no_results_are_refused(tmp_path, slowed):
    cases = {"none": None, "text": "hello", "list": "[]", "old": '{"bench": "mgn-deploy", "schema_version": 99}'}
    messages = []
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            read_result(tmp_path / name)
        messages.append(str(caught.value))
    assert [words in said for words, said in zip(
        ("No such file", "is no JSON", "is no result", "has schema 99"), messages, strict=True
    )] == [True] * 4  # fmt: skip
