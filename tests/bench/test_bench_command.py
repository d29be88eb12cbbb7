"""`mgn-deploy bench` as a command, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
from conftest import mgn_deploy

from mgn_deploy.bench import contenders, speed
from mgn_deploy.bench.result import read_result
from mgn_deploy.bench.speed import measure
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import REFERENCE, write_manifest
from mgn_deploy.errors import UserError


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
