"""`bench`: three rates in turns, on whole batches, of images that can be read."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
from conftest import mgn_deploy

import mgn_deploy.bench.throughput as throughput
from mgn_deploy.errors import UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.options import ExportOptions

SERIES = {"bare engine", "embed (files to store)", "PyTorch eager"}


def test_without_the_reference_weights_the_sentence_names_the_way_out(bundle_folder, weights, tmp_path):
    export_bundle(weights, tmp_path / "b", ExportOptions(reference=False))
    with pytest.raises(UserError, match=r"--no-reference$"):
        throughput.measure(tmp_path / "b", None, "onnxruntime", batch_size=2, count=8, runs=1)


def test_three_series_and_their_ratios(bundle_folder, crops):
    result = throughput.measure(bundle_folder, crops, "onnxruntime", batch_size=8, count=16, runs=3)
    assert set(result.series) == SERIES
    assert result.images == 16
    bare = result.series["bare engine"]
    for series in result.series.values():
        assert len(series.rates) == 3
        assert min(series.rates) > 0
        assert series.median == statistics.median(series.rates)
        assert series.ratio == pytest.approx(
            statistics.median(rate / other for rate, other in zip(series.rates, bare.rates, strict=True))
        )
    assert bare.ratio == 1
    assert result.model == "resnet18 MGN 96x32 fp32"
    assert result.backend.startswith("onnxruntime ")


def test_embed_is_measured_on_the_images_that_its_rate_counts(bundle_folder, crops, monkeypatch):
    """Forty images in batches of 16: 32 are counted, so 32 are embedded."""
    real, embedded = throughput.embed_folder, []

    def counting(*arguments, **options):
        report = real(*arguments, **options)
        embedded.append(report.embedded)
        return report

    monkeypatch.setattr(throughput, "embed_folder", counting)
    result = throughput.measure(bundle_folder, crops, "onnxruntime", batch_size=16, count=64, runs=1, reference=False)
    assert (result.images, embedded) == (32, [32, 32])
    assert set(result.series) == SERIES - {"PyTorch eager"}


def test_unreadable_images_are_passed_over(bundle_folder, crops, tmp_path):
    for path in sorted(crops.rglob("*.jpg"))[:8]:
        shutil.copy(path, tmp_path)
    (tmp_path / "0000.jpg").write_bytes(b"")
    result = throughput.measure(bundle_folder, tmp_path, "onnxruntime", batch_size=4, count=8, runs=1, reference=False)
    assert result.images == 8


def test_the_users_images_stay_as_they_are(bundle_folder, crops, tmp_path):
    shutil.copytree(crops, tmp_path / "crops")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    throughput.measure(bundle_folder, tmp_path / "crops", "onnxruntime", batch_size=8, count=8, runs=1, reference=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_fewer_images_than_a_batch_are_refused_with_their_number(bundle_folder, crops):
    with pytest.raises(
        UserError, match="40 readable images are fewer than a batch of 64: give more, or a smaller --batch"
    ):
        throughput.measure(bundle_folder, crops, "onnxruntime", batch_size=64, count=64)


def test_the_command_draws_people_and_prints_every_run(bundle_folder):
    done = mgn_deploy("bench", "--bundle", bundle_folder, "--count", 16, "--runs", 2, "--batch", 8, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["images"], printed["batch"]) == (16, 8)
    assert set(printed["images_per_second"]) == SERIES
    for series in printed["images_per_second"].values():
        assert series["median"] > 0
        assert len(series["rates"]) == 2
    assert "turn 0/2 (not counted)" in done.stderr


def test_the_table_names_model_engine_and_machine(bundle_folder, crops):
    done = mgn_deploy(
        "bench", "--bundle", bundle_folder, "--images", crops, "--count", 8, "--runs", 1, "--no-reference"
    )
    assert done.exit_code == 0, done.stderr
    for word in ("bare engine", "embed (files to store)", "median", "resnet18 MGN", "openvino", "CPUs"):
        assert word in " ".join(done.stdout.split())
