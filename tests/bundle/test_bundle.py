"""A bundle that is not what was exported, or not proven, is refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import onnx
import pytest

from mgn_deploy.backends.registry import ENGINES
from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.bundle.manifest import SCHEMA_VERSION, FileEntry, hash_line, write_manifest
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def refusal(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as refused:
        action(*arguments, **options)
    return str(refused.value)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_manifest_that_is_killed_while_it_is_written_is_the_old_or_the_new_one(bundle, monkeypatch, renames):
    manifest = Bundle.open(bundle).manifest
    done, rename = [], os.replace

    def dying(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(bundle, manifest.model_copy(update={"proofs": {}}))
    assert Bundle.open(bundle).manifest.proofs == ({} if renames == 2 else manifest.proofs)


def test_huge_file_in_a_bundle_is_not_read(bundle):
    os.truncate(bundle / "graph.onnx", 2**40)  # sparse
    assert "graph.onnx is not what was exported" in refusal(Bundle.open(bundle).read, "graph.onnx")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "graph.onnx", "reference.safetensors"])
def test_one_flipped_byte_anywhere_is_refused(bundle, name):
    path = bundle / name
    content = path.read_bytes()
    rng = random.Random(name)
    length = 64 if name == "manifest.sha256" else len(content)  # behind the digits the line holds only a name
    places = [0, length - 1, *(rng.randrange(length) for _ in range(6))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        sentence = refusal(Embedder.open, bundle, "torch" if name == "reference.safetensors" else "onnxruntime")
        assert "its SHA-256 differs" in sentence
        assert "copy the bundle or export it again" in sentence
    path.write_bytes(content)
    Bundle.open(bundle)


@pytest.mark.parametrize("name", ["graph.onnx", "manifest.json"])
def test_truncated_or_longer_file_is_refused(bundle, name):
    content = (bundle / name).read_bytes()
    for changed in (b"", content[:-1], content + b"\n"):
        (bundle / name).write_bytes(changed)
        assert "its SHA-256 differs" in refusal(Embedder.open, bundle, "onnxruntime")


@pytest.mark.parametrize(
    "version, advice", [(SCHEMA_VERSION - 1, "export the weights again"), (SCHEMA_VERSION + 1, "upgrade mgn-deploy")]
)
def test_bundle_of_another_schema_is_refused_with_what_to_do(bundle, version, advice):
    fields = {**json.loads((bundle / "manifest.json").read_text()), "schema_version": version, "new": 1}
    content = json.dumps(fields).encode()
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
    sentence = refusal(Embedder.open, bundle)
    assert f"has schema {version} and this mgn-deploy reads schema {SCHEMA_VERSION}: " in sentence
    assert advice in sentence


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema_version": 1}', b'{"schema_version": 1, "model": 5}', b"\xff"]
)
def test_manifest_of_something_else_with_a_right_hash_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
    assert "manifest.json" in refusal(Embedder.open, bundle)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "graph.onnx"])
def test_bundle_without_a_file_is_refused(bundle, name):
    (bundle / name).unlink()
    assert f"{name}: No such file or directory" in refusal(Embedder.open, bundle, "onnxruntime")


def test_what_is_no_bundle_is_refused(tmp_path, crops):
    (tmp_path / "file").write_text("a letter")
    for other in (tmp_path / "none", tmp_path / "file", crops):
        assert "is not a bundle" in refusal(Bundle.open, other)


def test_bundle_through_a_link(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle)
    assert Embedder.open(tmp_path / "link", "onnxruntime").bundle.id == Bundle.open(bundle).id


def without_reference(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / "reference.safetensors").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "reference.safetensors"}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))


def test_bundle_without_reference_has_no_torch_and_no_reference(bundle):
    before = Bundle.open(bundle).id
    without_reference(bundle)
    assert Bundle.open(bundle).id == before
    assert "was exported with --no-reference" in refusal(Embedder.open, bundle, "torch")
    assert "do without the comparison: --no-reference" in refusal(Embedder.open_reference, bundle)


def test_bundle_without_a_proof_for_the_backend_is_refused(bundle):
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, manifest.model_copy(update={"proofs": {"openvino": manifest.proofs["openvino"]}}))
    assert "has no proof for onnxruntime (proven: openvino)" in refusal(Embedder.open, bundle, "onnxruntime")
    Embedder.open(bundle, "onnxruntime", allow_unproven=True)


def test_unknown_backend_names_the_known(bundle_folder):
    names = ", ".join(ENGINES)
    assert f"no backend 'abacus': choose auto, {names}" in refusal(Embedder.open, bundle_folder, "abacus")


def identity_graph() -> bytes:
    """A graph that gives its pixels back."""
    pixels = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 96, 32, 3])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.UINT8, ["n", 96, 32, 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["out"])], "g", [pixels], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def replace_file(bundle: Path, name: str, content: bytes, **changes: object) -> None:
    """Another file, with a hash that is right, and perhaps other keys of the manifest."""
    (bundle / name).write_bytes(content)
    manifest = Bundle.open(bundle).manifest
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    write_manifest(bundle, manifest.model_copy(update={"files": {**manifest.files, name: entry}, **changes}))


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x08\x08" * 100, identity_graph()], ids=["empty", "junk", "bytes", "identity"]
)
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_graph_that_is_none_is_a_sentence_though_its_hash_is_right(bundle, content, backend):
    replace_file(bundle, "graph.onnx", content)
    sentence = refusal(Embedder.open, bundle, backend)
    assert "cannot open this graph" in sentence or "cannot run this graph" in sentence or "this graph maps" in sentence


def test_reference_weights_that_are_none_are_a_sentence_though_their_hash_is_right(bundle):
    replace_file(bundle, "reference.safetensors", b"junk" * 10)
    assert "are no whole safetensors file" in refusal(Embedder.open, bundle, "torch")


def test_reference_weights_of_another_model_are_a_sentence(bundle):
    config = Bundle.open(bundle).config.model_copy(update={"reduced_width": 8192})
    replace_file(bundle, "reference.safetensors", (bundle / "reference.safetensors").read_bytes(), model=config)
    sentence = refusal(Embedder.open, bundle, "torch")
    assert "reference weights do not fit its manifest: tensor 'branches.0.reductions.0.0.weight' has shape" in sentence


def test_manifest_nested_without_end_is_a_sentence(bundle):
    content = b'{"schema_version": ' + b"[" * 100_000
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_bytes(hash_line(content))
    assert "is not a manifest of mgn-deploy" in refusal(Bundle.open, bundle)
