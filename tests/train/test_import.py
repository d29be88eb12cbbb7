"""Public checkpoints as people have them: wrapped, old, compressed, half; and the command that imports them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mgn_deploy
from public_files import saved
from public_mgns import RESNET18, Basic, FastReid, ThreeParts, randomise
from safetensors.torch import save_file
from torch import nn

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.config import IMAGENET_MEAN
from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.importing import import_checkpoint
from mgn_deploy.train.weights import load_weights, save_weights, weights_hash

# Files as people have them


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return randomise(FastReid(3)).state_dict()


@pytest.fixture(scope="module")
def plain(state, tmp_path_factory) -> Path:
    """The weights folder of that state dict, saved without ceremony."""
    folder = tmp_path_factory.mktemp("plain")
    import_checkpoint(saved(state, folder), folder / "w")
    return folder / "w"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "metric": np.float64(0.9), "epoch": 59, "optimizer": {"lr": [0.1]}},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"net": {f"model.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()},
    ],
    ids=["fast-reid's", "state_dict", "DataParallel", "two prefixes", "parameters"],
)
def test_wrappers_and_prefixes_are_taken_off(state, plain, tmp_path, wrap):
    import_checkpoint(saved(wrap(state), tmp_path), tmp_path / "w")
    assert weights_hash(tmp_path / "w") == weights_hash(plain)


def test_what_is_beside_the_model_is_listed(state, tmp_path):
    path = saved({"model": state, "metric": np.float32(0.5), "epoch": np.int64(3)}, tmp_path)
    dropped = {group.reason: group.names for group in import_checkpoint(path, tmp_path / "w").dropped}
    assert dropped["beside the model in the file"] == ["metric", "epoch"]


def test_a_file_of_the_legacy_format_is_read(state, plain, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    import_checkpoint(tmp_path / "old.pth", tmp_path / "w")
    assert weights_hash(tmp_path / "w") == weights_hash(plain)


def test_a_compressed_archive_that_is_damaged_is_one_sentence(tmp_path):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(range(256)) * 40)
    start = 30 + len("archive/data.pkl")  # of the compressed bytes
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"\xff" * 6 + content[start + 6 :])
    with pytest.raises(UserError, match="is damaged, or ends too early"):
        import_checkpoint(path, tmp_path / "w")


def test_safetensors_are_read(state, plain, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "public.safetensors")
    import_checkpoint(tmp_path / "public.safetensors", tmp_path / "w")
    assert weights_hash(tmp_path / "w") == weights_hash(plain)


def test_half_precision_becomes_float32(state, tmp_path):
    import_checkpoint(saved({name: tensor.half() for name, tensor in state.items()}, tmp_path), tmp_path / "w")
    weight = load_weights(tmp_path / "w").state_dict()["trunk.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["backbone.0.weight"].half().float())


def test_counters_that_old_pytorch_did_not_save_are_filled_and_said(tmp_path):
    full = randomise(ThreeParts("backone", "avg")).state_dict()
    old = {name: tensor for name, tensor in full.items() if not name.endswith("num_batches_tracked")}
    report = import_checkpoint(saved(old, tmp_path), tmp_path / "w")
    assert set(report.filled) == full.keys() - old.keys()
    import_checkpoint(saved(full, tmp_path), tmp_path / "full")
    first, second = load_weights(tmp_path / "w").state_dict(), load_weights(tmp_path / "full").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first if not name.endswith("num_batches_tracked"))


def test_the_pixels_mean_and_deviation_are_the_files(plain):
    config = load_weights(plain).config
    np.testing.assert_allclose(config.mean, np.array([120, 115, 104]) / 255, atol=1e-6)
    np.testing.assert_allclose(config.std, np.array([58, 57, 57.5]) / 255, atol=1e-6)


def test_without_them_imagenets_are_assumed_and_said(state, tmp_path):
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("pixel_")}
    report = import_checkpoint(saved(bare, tmp_path), tmp_path / "w")
    assert load_weights(tmp_path / "w").config.mean == IMAGENET_MEAN
    assert "mean and deviation of pixels" in [one.what for one in report.assumed]


def test_the_origin_is_kept_beside_the_weights_and_not_in_their_hash(state, tmp_path):
    path = saved(state, tmp_path)
    report = import_checkpoint(path, tmp_path / "w")
    note = json.loads((tmp_path / "w" / "import.json").read_text())
    assert note == dataclasses.asdict(report)
    assert note["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    before = weights_hash(tmp_path / "w")
    (tmp_path / "w" / "import.json").unlink()
    assert weights_hash(tmp_path / "w") == before


def test_importing_again_replaces_the_folder_and_so_does_saving(state, tmp_path):
    path = saved(state, tmp_path)
    for _ in range(2):
        import_checkpoint(path, tmp_path / "w")
    save_weights(load_weights(tmp_path / "w"), tmp_path / "w")
    assert sorted(file.name for file in (tmp_path / "w").iterdir()) == ["config.json", "mgn.safetensors"]


# The command


def test_the_command_prints_the_folder_and_says_what_it_read_assumed_and_dropped(state, tmp_path):
    done = mgn_deploy("import", saved(state, tmp_path), "--from", "fastreid", "-o", tmp_path / "w")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'w'}\n"), done.stderr
    for line in (
        "assumed input size 384x128, override with --size",
        "assumed global stride 1, override with --global-stride",
        "assumed stem pool ceil, override with --stem-pool",
        "b33_head.weight",
        "export with --no-flip",
    ):
        assert line in done.stderr


def test_the_command_prints_its_report_as_json(tmp_path):
    state = randomise(ThreeParts("backone", "avg")).state_dict()
    done = mgn_deploy("import", saved(state, tmp_path), "-o", tmp_path / "w", "--stem-pool", "ceil", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weights"] == str(tmp_path / "w")
    assert {one["what"]: (one["value"], one["option"]) for one in report["assumed"]} == {
        "input size": ("384x128", "--size"),
        "pooling": ("avg", "--pool"),
        "global stride": (2, "--global-stride"),
    }
    assert report["given"] == {"stem_pool": "ceil"}
    assert len([name for group in report["dropped"] for name in group["names"]]) == 16


@pytest.mark.slow
def test_imported_weights_are_exported_and_proven_on_every_engine(tmp_path, crops):
    """IBN, generalised mean, and a norm after the ReLU; `test_graph.py` has the other choices."""
    path = saved(randomise(FastReid(1, width=16, blocks=RESNET18, kind=Basic)).state_dict(), tmp_path)
    assert mgn_deploy("import", path, "-o", tmp_path / "w", "--size", "96x32").exit_code == 0
    done = mgn_deploy("export", tmp_path / "w", "-o", tmp_path / "b", "--no-flip", "--proof-images", crops)
    assert done.exit_code == 0, done.stderr
    bundle = Bundle.open(tmp_path / "b")
    proven = {name for name, proof in bundle.manifest.proofs.items() if proof.passed}
    assert proven == {"openvino", "onnxruntime", "torch"}
    assert bundle.config == load_weights(tmp_path / "w").config
