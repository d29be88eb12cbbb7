"""A machine without PyTorch proves its engines against the reference that the export recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import FileEntry, write_manifest
from mgn_deploy.errors import CannotRun, UserError
from mgn_deploy.export.exporter import export_bundle
from mgn_deploy.export.options import ExportOptions
from mgn_deploy.export.proof.prove import drawn_pixels, prove_again
from mgn_deploy.export.proof.record import RECORD, record_bytes, recorded_embeddings
from mgn_deploy.files import sha256_bytes

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from mgn_deploy.__main__ import main
main()
"""


@pytest.fixture
def edge(bundle_folder, tmp_path) -> Path:
    """The bundle as it was copied to a box, without weights and without proofs."""
    folder = Path(shutil.copytree(bundle_folder, tmp_path / "edge"))
    manifest = Bundle.open(folder).manifest
    (folder / "reference.safetensors").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "reference.safetensors"}
    write_manifest(folder, manifest.model_copy(update={"files": files, "proofs": {}}))
    return folder


def prove_without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "prove", *map(str, arguments), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_engines_are_proven_on_drawn_people_without_torch(edge, bundle_folder):
    done = prove_without_torch("--bundle", edge)
    assert done.returncode == 0, done.stderr
    proofs = json.loads(done.stdout)["proofs"]
    assert set(proofs) == {"openvino", "onnxruntime"}
    before = Bundle.open(bundle_folder).manifest.proofs
    for name, proof in proofs.items():
        assert proof["worst_cosine"] == pytest.approx(before[name].worst_cosine, abs=1e-6)
    assert "no proof for torch: torch is not installed" in done.stderr


def test_images_that_were_not_recorded_are_counted_and_the_way_out_is_said(edge, crops):
    done = prove_without_torch("--bundle", edge, "--proof-images", crops)
    assert done.returncode == 2
    assert f"40 of 40 images of {crops.name} were not recorded when {edge} was exported" in done.stderr
    assert "others need the reference, which cannot run here: torch is not installed" in done.stderr


def test_images_of_the_export_are_proven_on_without_weights(weights, crops, tmp_path):
    export_bundle(weights, tmp_path / "b", ExportOptions(proof_images=crops, reference=False))
    made = prove_again(tmp_path / "b", proof_images=crops)
    assert made["openvino"].images == 40
    assert made["openvino"].passed
    assert prove_again(tmp_path / "b")["openvino"].drawn


def test_ranking_people_needs_the_reference(edge, tmp_path):
    from mgn_deploy.datasets import open_data
    from mgn_deploy.datasets.drawn import draw_market1501

    draw_market1501(tmp_path / "people", train_identities=1, test_identities=2)
    with pytest.raises(CannotRun, match="--data ranks people with the reference too, which cannot run here"):
        prove_again(edge, data=open_data(f"market1501:{tmp_path / 'people'}"))


def test_a_wrong_engine_is_not_proven_by_the_record(edge):
    bundle = Bundle.open(edge)
    crops = drawn_pixels(96, 32).crops
    wrong = np.roll(recorded_embeddings(bundle, crops, "drawn people"), 1, axis=0)
    replace(edge, record_bytes(crops, wrong))
    made = prove_again(edge)
    assert not any(proof.passed for proof in made.values())


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no zip", record_bytes(np.zeros((2, 3, 3, 3), np.uint8), np.ones((2, 5)))]
)
def test_broken_record_is_a_sentence(edge, content):
    replace(edge, content)
    with pytest.raises(UserError, match=r"proof\.npz (is no record|has \(2, 32\) hashes)"):
        prove_again(edge)


def replace(folder: Path, content: bytes) -> None:
    """Put other content into the record, with a hash that is right."""
    (folder / RECORD).write_bytes(content)
    manifest = Bundle.open(folder).manifest
    entry = FileEntry(sha256=sha256_bytes(content), size=len(content))
    write_manifest(folder, manifest.model_copy(update={"files": {**manifest.files, RECORD: entry}}))
