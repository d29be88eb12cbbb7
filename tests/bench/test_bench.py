"""`mgn-deploy bench`: one bounded run of engines x bundles x batches, its JSON, its page, and what disturbs it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import mgn_deploy

from mgn_deploy.backends.onnxruntime.cpu import OnnxRuntimeBackend
from mgn_deploy.bench import contenders, environment, server, speed, timing
from mgn_deploy.bench import page as page_module
from mgn_deploy.bench.compare import compare
from mgn_deploy.bench.contenders import operations
from mgn_deploy.bench.environment import Meter, Noise
from mgn_deploy.bench.page import page, table
from mgn_deploy.bench.result import Result, read_result
from mgn_deploy.bench.server import search
from mgn_deploy.bench.speed import measure
from mgn_deploy.bench.timing import limits
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE, write_manifest
from mgn_deploy.cuda.management import Management
from mgn_deploy.errors import CannotRun, GateFailed, UserError

FOREVER = float("inf")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    from mgn_deploy.datasets.drawn import draw_market1501

    folder = tmp_path_factory.mktemp("people")
    draw_market1501(folder, train_identities=1, test_identities=4)
    return folder


@contextmanager
def short(rounds):
    """A few rounds of short slices: a busy machine takes longer for them, and still does them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ROUNDS", rounds)
        patch.setattr(speed, "SLICE", (0.02, 0.05))
        yield patch


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


def test_a_busy_loop_beside_is_reported_as_noise(bundle_folder, crops):
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        result = measure(
            [bundle_folder], engines=["onnxruntime"], batches=[1], images=crops, count=4, minutes=0.08, reference=False
        )
    finally:
        busy.kill()
        busy.wait()
    (row,) = result.rows
    assert row.noise.disturbed
    assert row.noise.others > 0.25
    assert any("other processes used" in flag for flag in row.noise.flags)


@pytest.mark.parametrize(
    ("busy", "steal", "own", "flags"),
    [
        (1.02, 0.0, 1.0, []),
        (1.9, 0.0, 1.0, ["other processes used 0.90 CPUs"]),
        (1.0, 0.5, 1.0, ["the hypervisor took 50.0% of the time"]),
    ],
)
def test_work_of_others_and_theft_are_told_and_our_own_work_is_not(monkeypatch, busy, steal, own, flags):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    meter = Meter()
    meter.grown = np.array([1.0, busy, steal, own, 0])
    noise = meter.noise(0.01)
    assert (noise.flags, noise.disturbed) == (flags, bool(flags))


@pytest.mark.parametrize("named", ["Event", "Throttle"])  # by drivers since 535, and by older ones
def test_clocks_that_are_held_down_are_told_by_any_driver(monkeypatch, named):
    def reasons(device, value):
        value._obj.value = 0x4 | 0x40
        return 0

    calls = {"nvmlInit_v2": lambda: 0, "nvmlDeviceGetHandleByIndex_v2": lambda *_: 0}
    calls[f"nvmlDeviceGetCurrentClocks{named}Reasons"] = reasons
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(**calls))
    assert Management().slowed() == ["power cap", "thermal"]
    assert Management().joules() is None


def test_energy_is_not_counted_where_the_counter_began_again(embedder, monkeypatch):
    readings = iter([10.0, 25.0, 262_000.0, 5.0])
    monkeypatch.setattr(contenders, "joules", lambda: (next(readings), "CPU package-0"))
    images = SimpleNamespace(crops=np.zeros((1, embedder.height, embedder.width, 3), np.uint8))
    contender = contenders.Contender(SimpleNamespace(batch=1, images=1), embedder, images, ())
    for _ in range(2):
        assert contender._offline() > 0
    assert (contender.energy, contender.embedded) == (15.0, 1)


def test_a_copy_that_somebody_elses_repository_does_not_track_has_no_commit(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "environment.py").touch()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    assert environment._commit() is None
    git("add", ".")
    git("commit", "-m", "with it")
    assert environment._commit() == git("rev-parse", "HEAD")


def test_where_cupti_shows_no_kernel_a_gpus_time_is_not_zero(embedder, monkeypatch):
    monkeypatch.setattr("torch.profiler.profile", lambda **_: nullcontext(SimpleNamespace(events=list)))
    row = SimpleNamespace(batch=1, not_measured={})
    images = SimpleNamespace(crops=np.zeros((1, embedder.height, embedder.width, 3), np.uint8))
    speed._gpu_times(SimpleNamespace(row=row, images=images, embedder=embedder), calls=1)
    assert "CUPTI" in row.not_measured["gpu_ms"]


def test_rounds_that_vary_are_told_and_disturb_nothing():
    noise = Meter().noise(0.2)
    assert (noise.flags, noise.disturbed) == (["the rounds vary by 20.0%"], False)


def test_the_server_search_ends_near_the_highest_rate_that_holds():
    found = search(lambda rate: ((10.0 if rate <= 137 else 90.0), 100), 50.0, 100.0, FOREVER)
    assert found.held <= 137 < found.failed <= 1.05 * found.held
    assert (found.p99_ms, found.requests) == (10.0, 100)


def test_where_no_rate_holds_the_server_has_none():
    found = search(lambda rate: (90.0, 100), 50.0, 100.0, FOREVER)
    assert (found.held, found.p99_ms) == (0, None)


def test_without_time_for_a_trial_the_server_is_not_measured():
    with pytest.raises(CannotRun, match="left of --minutes"):
        search(lambda rate: (1.0, 100), 50.0, 100.0, time.monotonic())


@pytest.mark.timeout(60)
def test_an_engine_that_breaks_under_requests_ends_the_trial():
    pytest.importorskip("mlperf_loadgen")
    left = [3]

    def embed(images):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the GPU is lost")
        return images

    with pytest.raises(CannotRun, match="RuntimeError: the GPU is lost"):
        server.held_rate(embed, np.zeros((4, 1, 1, 3), np.uint8), 1, 100.0, 100.0, FOREVER)


def test_loadgen_finds_what_an_engine_holds(embedder, bundle_folder, crops):
    pytest.importorskip("mlperf_loadgen")
    with short(rounds=2) as patch:
        patch.setattr(server, "TRIALS", 2)
        result = measure(
            [bundle_folder], engines=["onnxruntime"], batches=[2], images=crops, count=8, minutes=0.5, p99=5000.0,
            reference=False,
        )  # fmt: skip
    found = result.rows[0].server
    assert found.held > 0
    assert found.p99_ms <= 5000
    assert found.requests >= 100


def test_the_command_writes_table_json_and_page(bundle_folder, crops, tmp_path):
    done = mgn_deploy(
        "bench", bundle_folder, "--images", crops, "--count", 8, "--batch", 2, "--minutes", 0.05,
        "--backend", "openvino", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    for words in ("resnet18 MGN 96x32", "fp32, openvino, batch 2", "fp32, torch, batch 2", "copy", "energy:"):
        assert words in " ".join(done.stdout.split())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.html", "bench.json"]
    assert read_result(tmp_path / "out").rows[0].engine == "openvino"


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "measure", lambda *_, **__: pytest.fail("minutes of work are lost"))
    (tmp_path / "file").touch()
    done = mgn_deploy("bench", "bundle", "--out", tmp_path / "file")
    assert done.exit_code == 2
    assert "File exists" in done.stderr


def test_a_batch_larger_than_the_count_has_its_images(crops):
    assert [len(contenders.read_images(crops, 96, 32, 4, batch).paths) for batch in (1, 8)] == [4, 8]


def test_without_the_reference_weights_the_sentence_names_the_way_out(bundle_folder, tmp_path):
    bundle = tmp_path / "b"
    shutil.copytree(bundle_folder, bundle)
    manifest = Bundle.open(bundle).manifest
    files = {name: entry for name, entry in manifest.files.items() if name != REFERENCE}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    with pytest.raises(UserError, match=r"--no-reference$"):
        measure([bundle], engines=["onnxruntime"], minutes=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [64]}, "40 readable images are fewer than a batch of 64: give more, or a smaller --batch"),
        ({"minutes": 0}, "--minutes 0: give a number above 0"),
        ({"p99": -1.0}, "--p99 -1: give a number above 0"),
        ({"engines": ["abacus"]}, "abacus"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bundle_folder, crops, options, message):
    with pytest.raises(UserError, match=message):
        measure([bundle_folder], images=crops, **options)


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
