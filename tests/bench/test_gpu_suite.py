"""`bench.gpu.matrix` as far as no GPU is needed: rows by engines of the CPU, and what is said of others."""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bench.gpu import matrix as gpu_matrix
from mgn_deploy.bench.gpu import suite as gpu_suite
from mgn_deploy.bench.gpu.turns import FEWEST_ROUNDS, REFERENCE, Rivals, TorchRival
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.cuda.device import gpu_problem
from mgn_deploy.embedder import Embedder
from mgn_deploy.export.proof.agreement import cosines
from mgn_deploy.images.decode import read_crop

FEW = ("--no-compile", "--rounds", "1", "--batches", "1,2")
without_gpu = pytest.mark.skipif(gpu_problem() is None, reason="this machine has a GPU")


@pytest.fixture(scope="module")
def pixels(crops):
    return np.stack([read_crop(path, 96, 32) for path in sorted(crops.rglob("*.jpg"))[:12]])


def matrix(tmp_path, weights, *arguments):
    """Exit status and what was written, None without a file."""
    out = tmp_path / "matrix.json"
    status = gpu_matrix.main(["--out", str(out), "--weights", str(weights), *FEW, *map(str, arguments)])
    return status, json.loads(out.read_text()) if out.is_file() else None


def test_neighbours_share_a_graph_and_only_fp16_has_fused_heads():
    cells = gpu_matrix.cells(list(gpu_matrix.PRECISIONS), list(gpu_matrix.ENGINES))
    assert len(cells) == len(set(cells)) == 5 * 3
    assert {cell.precision for cell in cells if cell.fused_heads} == {"fp16"}
    graphs = [cell.graph for cell in cells]
    assert sum(one != other for one, other in pairwise(graphs)) == len(set(graphs)) - 1
    placements = {cell.engine: cell.placement for cell in cells if cell.precision == "int8"}
    assert placements == {
        "tensorrt": "tensorrt",
        "tensorrt-rtx": "tensorrt-rtx",
        "onnxruntime-cuda": None,
    }


@pytest.mark.slow
@without_gpu
def test_what_runs_is_measured_and_what_fails_or_is_missing_is_a_row_with_the_reason(weights, tmp_path):
    (tmp_path / "none").mkdir()
    engines = ("--engines", "onnxruntime,onnxruntime-cuda", "--precisions", "int8,fp32")
    status, result = matrix(tmp_path, weights, *engines, "--calib", tmp_path / "none")
    assert status == 1
    rows = {(row["precision"], row["engine"]): row for row in result["rows"]}
    assert len(rows) == 4
    assert str(tmp_path / "none") in rows["int8", "onnxruntime"]["failed"]
    for precision in ("int8", "fp32"):
        assert rows[precision, "onnxruntime-cuda"]["left_out"] == ENGINES["onnxruntime-cuda"].load().missing()
    row = rows["fp32", "onnxruntime"]
    assert row["proof"]["worst_cosine"] > 0.99999
    assert row["proof"]["image_source"] == "drawn people"
    assert set(row["speed"]) == {"1", "2"}
    for one in (*row["speed"].values(), *(each["rivals"][REFERENCE] for each in row["speed"].values())):
        assert one["images/s"] > 0
        assert one["latency ms"] > 0
    assert result["device"]["cpu"]
    assert result["weights"]["random"] is False


@pytest.mark.slow
@without_gpu
def test_without_an_engine_that_runs_the_rows_say_why_and_it_cannot_run(weights, tmp_path):
    status, result = matrix(tmp_path, weights)
    assert status == 2
    assert len(result["rows"]) == 5 * 3
    assert all(row["left_out"] for row in result["rows"])


def test_a_budget_that_is_over_ends_the_run_with_all_rows_written(weights, tmp_path):
    engines = ("--engines", "onnxruntime", "--precisions", "fp16,fp32")
    status, result = matrix(tmp_path, weights, *engines, "--budget", 0)
    assert status == 2
    assert [row["not_begun"] for row in result["rows"]] == ["the budget of 0 s was over"] * 2


@pytest.mark.slow
def test_int8_is_calibrated_on_drawn_people_and_ranked_where_data_is_given(weights, tmp_path):
    from mgn_deploy.datasets.drawn import draw_market1501

    draw_market1501(tmp_path / "people", train_identities=1, test_identities=6)
    given = ("--data", f"market1501:{tmp_path / 'people'}", "--precisions", "int8", "--engines", "onnxruntime")
    _, result = matrix(tmp_path, weights, *given, "--max-drop", 100)
    (row,) = result["rows"]
    assert row["quantisation"]["images"] >= 100
    assert 0 < row["proof"]["ranking"]["mAP"] <= 1
    assert set(row["speed"]["1"]["rivals"]) == {REFERENCE, "torch fp16"}


@pytest.mark.parametrize("arguments", [("--engines", "torch"), ("--precisions", "fp8")])
def test_an_unknown_choice_is_refused_by_its_name(weights, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        matrix(tmp_path, weights, *arguments)
    assert f"{arguments[1]}: choose from" in capsys.readouterr().err


def test_a_result_is_written_after_each_row(weights, tmp_path):
    from mgn_deploy.bench.gpu.rows import Matrix

    chosen = argparse.Namespace(
        budget=0, weights=weights, data=None, calib=None, no_compile=True, rounds=1, max_drop=None
    )
    chosen.precisions, chosen.engines, chosen.batches = ["fp32", "bf16"], ["openvino", "onnxruntime"], [1]
    written = []
    Matrix(chosen, tmp_path, lambda result: written.append(len(result["rows"]))).run()
    assert written == [1, 2, 3, 4]


def test_turns_keep_the_fewest_rounds_where_time_is_short_and_go_on_without_a_rival_that_fails(
    bundle_folder, embedder, pixels, tmp_path
):
    rivals = Rivals(tmp_path / "no weights", True, [2])
    found = rivals.turns(embedder.backend, Bundle.open(bundle_folder), pixels, rounds=9, until=time.monotonic())
    speed = found["2"]
    assert speed["rounds"] == FEWEST_ROUNDS
    assert "no weights" in speed["rivals"]["torch_compile fp32"]["failed"]
    reference = speed["rivals"][REFERENCE]
    assert reference["x"] > 0
    assert reference["images/s"] > 0


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.99999), ("fp16", 0.9999), ("bf16", 0.999)])
def test_pytorch_in_every_type_gives_the_references_embeddings(weights, bundle_folder, pixels, precision, least):
    rival = TorchRival(weights, True, precision, compiled=False)
    found, expected = rival(pixels), Embedder.open_reference(bundle_folder).backend(pixels)
    assert found.dtype == np.float32
    assert cosines(found, expected).min() > least


def test_the_suite_hands_on_what_the_matrix_is_told_with_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chosen = argparse.Namespace(weights="w", data="market1501:people", calib=None, precisions="fp16,int8", engines=None)
    folder = Path(tmp_path).resolve()
    assert gpu_suite.matrix_options(chosen) == [
        *("--weights", str(folder / "w")),
        *("--data", f"market1501:{folder / 'people'}"),
        *("--precisions", "fp16,int8"),
    ]
