"""`bench.gpu`: the whole suite on the CPU, through the code that a GPU runs; and what it says without one."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mgn_deploy.bench.gpu import __main__ as suite
from mgn_deploy.bench.gpu import bundles, stages
from mgn_deploy.bench.gpu.bundles import weights_bundle
from mgn_deploy.bench.gpu.claims import HEADLINE, judge
from mgn_deploy.bench.gpu.rivals import TorchRival
from mgn_deploy.bench.gpu.stages import STAGES, TOOLS, Setup, sanitizer
from mgn_deploy.bench.kernel import contenders
from mgn_deploy.bench.speed import measure
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import CannotRun
from mgn_deploy.export.proof.agreement import cosines
from mgn_deploy.images.decode import read_crop

without_gpu = pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")


@pytest.fixture(scope="module")
def out(weights, bundle_folder, tmp_path_factory) -> Path:
    """One run; that of these weights there is a bundle already spares it PyTorch's export."""
    folder = tmp_path_factory.mktemp("suite")
    assert suite.main(["--out", str(folder), "--device", "cpu", "--minutes", "0.1", "--weights", str(weights)]) == 0
    return folder


def result_of(folder):
    return json.loads((folder / "suite.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [name for name in STAGES if name != "sanitizer"])
def test_every_stage_runs_on_the_cpu_by_the_same_code(out, stage):
    found = result_of(out)["stages"][stage]
    assert found["state"] == "passed"
    assert any("left_out" not in row for row in found["rows"])
    assert not any("failed" in row for row in found["rows"])


@pytest.mark.slow
def test_the_result_is_few_files_and_every_claim_is_said_and_none_is_measured_on_a_cpu(out):
    assert len(list(out.iterdir())) <= 6
    claims = result_of(out)["claims"]
    assert len(claims) == 9
    assert {claim["measured"] for claim in claims} == {"not measured"}
    page = (out / "suite.md").read_text()
    assert all(claim["claim"] in page and claim["target"] in page for claim in claims)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_package_is_named_without_the_extra_of_another(out):
    reasons = [row["left_out"] for row in result_of(out)["stages"]["facts"]["rows"] if "left_out" in row]
    assert "tensorrt is not installed" in reasons


@pytest.mark.slow
def test_engines_are_measured_beside_pytorch_in_turns(out):
    rows = {row["row"]: row for row in result_of(out)["stages"]["engines"]["rows"]}
    name = "resnet18 MGN 96x32 fp32, {}, batch 4"
    for engine in ("openvino", "onnxruntime", "torch folded fp32", "torch-cuda unfused fp32"):
        assert rows[name.format(engine)]["over_reference"] > 0
    assert rows["resnet18 MGN 96x32 bf16, torch folded bf16, batch 1"]["pixels"]["calls"] >= 1


@pytest.mark.slow
def test_run_again_it_goes_on_with_what_has_not_passed(out, monkeypatch):
    before, ran = result_of(out), []
    for name, (share, _) in STAGES.items():
        monkeypatch.setitem(STAGES, name, (share, lambda setup, name=name: ran.append(name) or iter([])))
    suite.main(["--out", str(out), "--device", "cpu", "--minutes", "0.1"])
    assert ran == ["sanitizer"]
    after = result_of(out)["stages"]
    assert {name: stage["rows"] for name, stage in after.items() if name != "sanitizer"} == {
        name: stage["rows"] for name, stage in before["stages"].items() if name != "sanitizer"
    }


def test_a_stage_that_breaks_does_not_stop_the_next_one(monkeypatch, tmp_path):
    def broken(setup):
        yield {"row": "first"}
        raise RuntimeError("the GPU\nis lost")

    monkeypatch.setitem(STAGES, "distances", (1.0, broken))
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.2", "--stages", "distances,rerank"]
    assert suite.main(arguments) == 1
    stages = result_of(tmp_path)["stages"]
    assert stages["distances"]["state"] == "failed"
    assert stages["distances"]["rows"] == [
        {"row": "first"},
        {"row": "distances", "failed": "RuntimeError: the GPU is lost"},
    ]
    assert stages["rerank"]["state"] == "passed"


def chosen(tmp_path):
    return argparse.Namespace(device="cpu", weights=None, out=tmp_path)


def test_on_a_gpu_a_stage_is_a_process_that_leaves_its_rows(tmp_path):
    """One of its own also has Triton's interpreter, which a process has from its start or never."""
    pytest.importorskip("triton")
    assert suite._in_process("correctness", chosen(tmp_path), tmp_path, 60) == "passed"
    rows = [json.loads(line) for line in (tmp_path / "correctness.rows").read_text().splitlines()]
    errors = {row["row"]: row["error"] for row in rows if row.get("contender") == "triton" and "error" in row}
    assert set(errors) == {f"{dtype} nhwc mirror_embeddings 3" for dtype in ("float32", "float16")}
    assert max(errors.values()) < 1e-5


def test_a_stage_past_its_time_is_ended(tmp_path):
    start = time.monotonic()
    assert suite._in_process("train-step", chosen(tmp_path), tmp_path, -4.5) == "out of time"
    assert time.monotonic() - start < 5


def test_ctrl_c_ends_the_stages_process_too(tmp_path, monkeypatch):
    processes = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not processes:
                processes.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite._in_process("train-step", chosen(tmp_path), tmp_path, 60)
    assert processes[0].returncode == -signal.SIGKILL


@without_gpu
def test_without_a_gpu_every_stage_says_so_and_nothing_could_run(tmp_path, capsys):
    assert suite.main(["--out", str(tmp_path), "--minutes", "0.1"]) == 2
    stages = result_of(tmp_path)["stages"]
    assert set(stages) == set(STAGES)
    assert all("no NVIDIA driver or GPU was found" in stage["rows"][0]["left_out"] for stage in stages.values())


def test_an_unknown_stage_is_refused_by_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main(["--out", str(tmp_path), "--stages", "abacus"])
    assert "--stages abacus: choose from facts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "key", "words"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', "said", "ERROR SUMMARY: 0 errors"),
        ('echo "========= ERROR SUMMARY: 3 errors"; exit 9', "failed", "ERROR SUMMARY: 3 errors (exit 9)"),
        ('echo "Error: device not supported under MPS"; exit 1', "left_out", "the tool refuses: Error: device not"),
    ],
)
def test_a_sanitizers_errors_fail_and_its_refusal_does_not(tmp_path, monkeypatch, script, key, words):
    program = tmp_path / "compute-sanitizer"
    check = 'test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 77'
    program.write_text(f"#!/bin/sh\n{check}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    rows = list(sanitizer(Setup("cpu", tmp_path, time.monotonic() + 30)))
    assert [row["row"] for row in rows] == [f"sanitizer {tool}" for tool in TOOLS]
    assert {"memcheck", "initcheck", "racecheck", "synccheck"} == set(TOOLS)
    assert all(row[key].startswith(words) for row in rows)


def test_under_a_sanitizer_which_has_no_pool_of_memory_no_graph_is_captured(tmp_path, monkeypatch):
    def refuse():
        raise CannotRun("not here")

    names = ("torch_op", "kernel", "kernel_fused", "kernel_graph", "eager", "compiled_graph")
    monkeypatch.setattr(contenders, "makers", lambda *_: dict.fromkeys(names, refuse))
    monkeypatch.setenv("MGN_QUICK", "1")
    rows = stages.correctness(Setup("cpu", tmp_path, time.monotonic() + 30))
    assert {row["contender"] for row in rows} == {"torch_op", "kernel", "kernel_fused"}


def test_on_a_gpu_the_kernel_is_a_tail_and_what_is_slow_to_open_comes_last(tmp_path, monkeypatch):
    asked = []

    def measured(setup, bundle, batches, seconds, rivals, **_):
        asked.append((bundle.name, *rivals))
        yield {"row": bundle.name}

    monkeypatch.setattr(stages, "_measured", measured)
    monkeypatch.setattr(bundles, "bundles", lambda _, precisions: [(name, tmp_path / name) for name in precisions])
    list(stages.engines(Setup("cuda", tmp_path, time.monotonic() + 30)))
    first, *_, last = asked
    assert {"torch-cuda kernel fp16", "torch eager fp16", "torch folded bf16"} < set(first)
    assert last == ("fp16", "torch.compile fp16")


def test_a_claim_is_kept_or_not_by_the_figure_that_was_measured():
    kernel = [
        {"row": f"{HEADLINE} 32", "contender": "kernel_graph", "of_copy": 0.8, "cold_us": 10.0},
        {"row": f"{HEADLINE} 32", "contender": "triton_graph", "cold_us": 10.4},
        {"row": f"{HEADLINE} 1", "contender": "kernel_graph", "cold_us": 10.0},
        {"row": f"{HEADLINE} 1", "contender": "eager", "cold_us": 45.0},
    ]
    sanitized = [
        {"row": "sanitizer memcheck", "said": "0 errors"},
        {"row": "sanitizer racecheck", "failed": "3 errors"},
    ]
    network = {"precision": "fp16", "batch": 64, "device": "NVIDIA H100"}
    rows = [
        {**network, "engine": engine, "of_matrix_rate": share, "offline": {"median": rate}}
        for engine, share, rate in (
            ("tensorrt", 0.5, 2000.0),
            ("torch-cuda kernel fp16", 0.6, 2500.0),
            ("torch folded fp16", 0.9, 9000.0),
            ("torch eager fp16", 0.2, 1000.0),
        )
    ]
    judged = judge({"kernel": kernel, "sanitizer": sanitized, "engines": rows})
    found = {one["claim"].split(":")[0]: (one["measured"], one["holds"]) for one in judged}
    assert found["the kernel at batch 32"] == ("0.80", False)
    assert found["the kernel at batch 1 over PyTorch's eager heads"] == ("4.5", True)
    assert found["the kernel at batch 32 over its rival in Triton's language (else it goes)"] == ("1.04", False)
    assert found["compute-sanitizer finds nothing, in four tools"] == ("1", False)
    assert found["the network at batch 64, fp16 with mirrors"] == ("0.60", True)
    assert found["the network at batch 64 over PyTorch eager, both in fp16"] == ("2.5", True)
    assert found["`embed` at batch 32"] == ("not measured", None)


@pytest.mark.parametrize("way", ["eager", "folded"])
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("fp16", 0.9999), ("bf16", 0.999)])
def test_pytorch_in_every_type_gives_the_references_embeddings(bundle_folder, crops, precision, least, way):
    pixels = np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))[:12]])
    rival = TorchRival(Bundle.open(bundle_folder), precision, way)
    found, expected = rival(pixels), Embedder.open_reference(bundle_folder).backend(pixels)
    assert found.dtype == np.float32
    assert cosines(found, expected).min() > least


def test_where_no_exporter_is_installed_weights_alone_are_a_bundle_for_pytorch(weights, crops, tmp_path):
    weights_bundle(weights, tmp_path / "b", "fp16")
    result = measure(
        [tmp_path / "b"], engines=["onnxruntime"], batches=[1], images=crops, count=4, minutes=0.05, allow_unproven=True
    )
    rows = {row.engine: row for row in result.rows}
    assert rows["torch"].offline.median > 0
    assert rows["onnxruntime"].not_measured["engine"]
