"""`validate` as a command and a gate, and the embeddings that it keeps."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import mgn_deploy
from validations import draw, spoilt

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.datasets import open_data
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.gallery.store import Store
from mgn_deploy.retrieval.ranking import KEYS
from mgn_deploy.retrieval.validate import validate, validation_store


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "people")


@pytest.fixture(scope="module")
def wrong_bundle(bundle_folder, tmp_path_factory):
    return spoilt(bundle_folder, tmp_path_factory.mktemp("wrong") / "b")


def test_the_command_prints_json_and_passes(root, bundle_folder):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder, "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["passed"] is True
    assert printed["backend"] == "openvino"
    assert set(KEYS) <= set(printed["measured"]) == set(printed["reference"])
    assert printed["difference"] == pytest.approx(dict.fromkeys(KEYS, 0), abs=1e-6)


def test_the_command_without_reference_judges_nothing(root, bundle_folder):
    done = mgn_deploy(
        "validate",
        "--data",
        f"market1501:{root}",
        "--bundle",
        bundle_folder,
        "--no-reference",
        "--tolerance",
        0,
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["reference"], printed["difference"], printed["passed"]) == (None, None, None)


def test_a_difference_past_the_tolerance_exits_1(root, wrong_bundle):
    arguments = (
        "validate",
        "--data",
        f"market1501:{root}",
        "--bundle",
        wrong_bundle,
        "--backend",
        "onnxruntime",
        "--allow-unproven",
        "--json",
    )
    done = mgn_deploy(*arguments, "--tolerance", 0)
    assert done.exit_code == 1
    printed = json.loads(done.stdout)
    assert printed["passed"] is False
    worst = max(abs(printed["difference"][key]) for key in ("rank-1", "mAP"))
    assert worst > 0
    assert f"differs by {100 * worst:.2f} points from the reference, more than 0" in done.stderr
    assert mgn_deploy(*arguments, "--tolerance", 100).exit_code == 0


def test_an_unproven_engine_is_not_validated_by_accident(root, wrong_bundle):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", wrong_bundle, "--backend", "onnxruntime")
    assert done.exit_code == 2
    assert "--allow-unproven" in done.stderr


def test_a_table_for_people_tells_percent_and_the_difference(root, bundle_folder):
    done = mgn_deploy("validate", "--data", f"market1501:{root}", "--bundle", bundle_folder)
    assert done.exit_code == 0, done.stderr
    for word in ("rank-1", "mAP", "mINP", "openvino", "PyTorch", "difference", "+0.00", "percent"):
        assert word in done.stdout


def test_an_unreadable_image_is_named(root, bundle_folder, tmp_path):
    shutil.copytree(root, tmp_path / "people")
    broken = sorted((tmp_path / "people" / "query").iterdir())[2]
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=f"{broken.name}' cannot be embedded: the file is empty"):
        validate(open_data(f"market1501:{tmp_path / 'people'}"), Embedder.open(bundle_folder, "onnxruntime"), None)


# Kept embeddings


def test_a_run_that_was_stopped_goes_on_from_its_store(root, bundle_folder, tmp_path):
    data = open_data(f"market1501:{root}")
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    total = len(data.query) + len(data.without_junk().gallery)

    def stop(step, done, whole):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(data, embedder, None, store=tmp_path / "kept", progress=stop)
    [folder] = (tmp_path / "kept").iterdir()
    assert folder.name == f"onnxruntime-{embedder.bundle.id[:12]}"
    before = len(Store.open(folder))
    assert total // 2 <= before < total
    done = []
    result = validate(data, embedder, None, store=tmp_path / "kept", progress=lambda _, at, whole: done.append(whole))
    assert done[0] == total - before
    plain = validate(data, embedder, None)
    assert result.measured.to_dict() == pytest.approx(plain.measured.to_dict(), abs=1e-9)


def test_a_cache_that_cannot_be_written_is_told_and_stops_nobody(root, bundle_folder, tmp_path, monkeypatch, said):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert validation_store(Bundle.open(bundle_folder), open_data(f"market1501:{root}")) is None
    assert "no embedding is kept for another run: " in said[-1]
    assert "cannot be made (Not a directory)" in said[-1]


def test_junk_is_never_embedded_and_changes_no_figure(root, bundle_folder, tmp_path, said):
    data = open_data(f"market1501:{root}")
    junk = [image for image in data.gallery if image.identity == -1]
    assert junk
    embedder = Embedder.open(bundle_folder, "onnxruntime")
    validate(data, embedder, None, store=tmp_path / "kept")
    [folder] = (tmp_path / "kept").iterdir()
    names = {row.name for row in Store.open(folder)}
    assert len(names) == len(data.query) + len(data.gallery) - len(junk)
    assert f"{len(junk)} junk images of the gallery are never ranked, and not embedded" in said


def test_the_reference_runs_on_a_sample_of_people(root, bundle_folder, said):
    data = open_data(f"market1501:{root}")
    embedder, reference = Embedder.open(bundle_folder, "onnxruntime"), Embedder.open_reference(bundle_folder)
    result = validate(data, embedder, reference, reference_sample=20)
    assert result.sample is not None
    assert result.reference is None
    assert result.measured.queries == len(data.query)
    assert result.sample.measured.queries < len(data.query)
    assert result.differences() == pytest.approx(dict.fromkeys(KEYS, 0), abs=1e-6)
    assert result.passes()
    assert "the difference is about them" in " ".join(said)


def test_an_image_that_cannot_be_read_is_named(root, bundle_folder, tmp_path):
    shutil.copytree(root, tmp_path / "people")
    victim = sorted((tmp_path / "people/query").iterdir())[0]
    victim.write_bytes(b"")
    data = open_data(f"market1501:{tmp_path / 'people'}")
    with pytest.raises(UserError, match=f"{victim.name}' cannot be embedded: the file is empty"):
        validate(data, Embedder.open(bundle_folder, "onnxruntime"), None, store=tmp_path / "kept")
