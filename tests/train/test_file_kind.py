"""A file that is no checkpoint is named for what it is, with what to do about it, and nothing in it runs."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from bomb import Bomb
from safetensors.torch import save
from torch import nn

from mgn_deploy.errors import UserError
from mgn_deploy.train.tensor_file import read_checkpoint

WEIGHTS = {"conv.weight": torch.arange(9.0).reshape(3, 3), "conv.bias": torch.arange(3.0)}
SAVE = "save `model.state_dict()` with torch.save where it was made"


def torch_bytes(content: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_checkpoint(path)
    sentence = str(refused.value)
    assert sentence.startswith(str(path))
    return sentence.removeprefix(str(path)).strip()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: download or copy it again"),
        (b"\n <!DOCTYPE html><title>Sign in</title>", "is a web page, which a server sent in place of the file"),
        (b"<html>\xff</html>", "is a web page, which a server sent in place of the file"),
        (b'{"error": "not found"}', 'is text, \'{"error": "not found"}\': download or copy it again'),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (gzip.compress(torch_bytes(WEIGHTS)), "is compressed by gzip: unpack it with gunzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, as Keras writes it"),
        (torch_bytes(WEIGHTS)[:-40], "is damaged, or ends too early"),
        (torch_bytes(WEIGHTS)[:40], "is damaged, or ends too early"),
        (save(WEIGHTS)[:-4], "is not a whole safetensors file"),
        (bytes(1000), "cannot be read as weights"),
        (pickle.dumps({"a": 1}, protocol=0), "is a Python pickle that torch.save did not write"),
        (pickle.dumps(Bomb("/nowhere"), protocol=0), "is a Python pickle that torch.save did not write"),
        (b"cars\nred\nblue\n", "is text, 'cars"),
        (pickle.dumps({"a": 1}, protocol=2), "is a Python pickle that torch.save did not write"),
        (pickle.dumps({"a": 1}), "is a Python pickle that torch.save did not write"),
        (torch_bytes(nn.Linear(2, 2)), "holds Python objects (torch.nn.modules.linear.Linear)"),
        (torch_bytes([1.0]), "holds a list, not a state dict"),
    ],
)
def test_a_file_is_named_for_what_it_is(tmp_path, content, sentence):
    (tmp_path / "mgn.pth").write_bytes(content)
    assert sentence in refusal(tmp_path / "mgn.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_call_code_is_named_and_not_run(tmp_path, legacy):
    content = torch_bytes({"a": Bomb(tmp_path / "exploded")}, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "mgn.pth").write_bytes(content)
    sentence = refusal(tmp_path / "mgn.pth")
    assert "it holds Python objects (" in sentence
    assert sentence.endswith(f"reading them could run code; {SAVE}")
    assert not (tmp_path / "exploded").exists()


def test_every_flipped_bit_of_a_tensor_is_found(tmp_path):
    content = torch_bytes(WEIGHTS)
    start = content.index(WEIGHTS["conv.weight"].numpy().tobytes())
    for bit in range(0, 8 * 36, 7):
        broken = bytearray(content)
        broken[start + bit // 8] ^= 1 << bit % 8
        (tmp_path / "mgn.pth").write_bytes(broken)
        assert refusal(tmp_path / "mgn.pth").startswith("is damaged, as the checksum of ")


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_archives_of_other_things_are_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    with zipfile.ZipFile(tmp_path / "zipped.pth", "w") as archive:
        archive.writestr("release/mgn.pth", torch_bytes(WEIGHTS))
    with tarfile.open(tmp_path / "tarred.pth", "w") as archive:
        archive.add(tmp_path / "zipped.pth", "mgn.pth")
    assert refusal(tmp_path / "script.pt") == f"is a TorchScript archive, which holds code: {SAVE}"
    assert refusal(tmp_path / "zipped.pth") == "is a zip archive of other files (release/mgn.pth): unpack it"
    assert refusal(tmp_path / "tarred.pth") == "is a tar archive: unpack it"
    assert "a folder, not a file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["mgn.pth", "mgn.safetensors", "mgn"])
@pytest.mark.parametrize(
    "content",
    [torch_bytes(WEIGHTS), torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False), save(WEIGHTS)],
    ids=["zip", "legacy", "safetensors"],
)
def test_the_content_tells_how_it_is_read_and_not_the_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    tensors = read_checkpoint(tmp_path / name).tensors
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == {
        key: tensor.tolist() for key, tensor in WEIGHTS.items()
    }


# Out of their wrappers


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("content", "beside"),
    [
        (prefixed("_orig_mod."), ()),
        (prefixed("module._orig_mod.model."), ()),
        ({"n_averaged": torch.tensor(3), **prefixed("module.")}, ("n_averaged",)),
        ({"model": WEIGHTS, "epoch": 3}, ("epoch",)),
        ({"params": prefixed("net.")}, ()),
        ({"model_state": WEIGHTS, "optimizer": {"state": {0: torch.ones(3)}}}, ("optimizer",)),
        ({"ema": prefixed("module."), "updates": 5}, ("updates",)),
        ({"ema": {"conv.weight": torch.zeros(3, 3)}, "model": WEIGHTS}, ("ema",)),
        ({"checkpoint": {"epoch": 1, "state_dict": {"net": WEIGHTS}}, "args": {"lr": 1}}, ("args", "epoch")),
        ({"mine": WEIGHTS}, ()),
    ],
)
def test_a_state_dict_is_found_in_its_wrappers(tmp_path, content, beside):
    torch.save(content, tmp_path / "mgn.pth")
    found = read_checkpoint(tmp_path / "mgn.pth")
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in WEIGHTS.items()
    }
    assert found.beside == beside


def test_two_state_dicts_of_unknown_names_are_refused_by_these(tmp_path):
    torch.save({"teacher": WEIGHTS, "student": WEIGHTS}, tmp_path / "mgn.pth")
    assert "under 'teacher' is a dict" in refusal(tmp_path / "mgn.pth")
