"""Weights on disk: whole or not at all, no pickle, and every broken folder told in a sentence."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TINY

from mgn_deploy.errors import UserError
from mgn_deploy.train.weights import (
    CONFIG,
    TENSORS,
    load_weights,
    new_model,
    save_weights,
    weights_hash,
)


@pytest.fixture
def folder(weights, tmp_path) -> Path:
    """A copy of the small weights that a test may break."""
    return Path(shutil.copytree(weights, tmp_path / "copy"))


def test_a_saved_model_comes_back_bit_by_bit(tmp_path):
    model = new_model(TINY, seed=3)
    model.train()
    model(torch.randn(2, 3, 96, 32))  # moves the norms' statistics
    save_weights(model, tmp_path / "w")
    back = load_weights(tmp_path / "w")
    assert back.config == TINY
    assert not back.training
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_weights_in_a_folder_whose_name_is_no_utf8_are_read(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "M\udce4rz")
    assert weights_hash(moved) == weights_hash(folder)
    assert load_weights(moved).state_dict().keys() == load_weights(folder).state_dict().keys()


def test_the_memory_format_of_training_does_not_reach_the_file(tmp_path):
    model = new_model(TINY, seed=3)
    save_weights(model, tmp_path / "plain")
    save_weights(model.to(memory_format=torch.channels_last), tmp_path / "last")
    assert weights_hash(tmp_path / "plain") == weights_hash(tmp_path / "last")


def test_saving_replaces_earlier_weights_and_leaves_nothing_beside_them(tmp_path):
    for seed in (1, 2):
        save_weights(new_model(TINY, seed=seed), tmp_path / "w")
    expected = new_model(TINY, seed=2).state_dict()
    assert torch.equal(load_weights(tmp_path / "w").state_dict()["trunk.0.weight"], expected["trunk.0.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [CONFIG, TENSORS]


def test_saving_never_replaces_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="choose another path"):
        save_weights(new_model(TINY), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_weights(tmp_path):
    save_weights(new_model(TINY, seed=1), tmp_path / "w")
    before = weights_hash(tmp_path / "w")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            save_weights(new_model(TINY, seed=2), tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights_hash(tmp_path / "w") == before
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_hash_is_of_config_and_tensors(folder):
    before = weights_hash(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "mean": [0.5, 0.5, 0.5]}))
    assert weights_hash(folder) != before


def test_a_model_with_other_choices_than_the_papers_comes_back(tmp_path):
    choices = {"ibn": "a", "stem_pool": "ceil", "global_stride": 1, "pooling": "gem", "neck": "relu_norm"}
    model = new_model(TINY.model_copy(update=choices), seed=3).eval()
    save_weights(model, tmp_path / "w")
    back = load_weights(tmp_path / "w")
    assert back.config == model.config
    images = torch.randn(2, 3, 96, 32)
    with torch.inference_mode():
        assert torch.equal(back(images), model(images))


def test_a_config_of_before_these_choices_opens_as_the_papers(folder):
    before, config = load_weights(folder).config, json.loads((folder / CONFIG).read_text())
    for choice in ("ibn", "stem_pool", "global_stride", "pooling", "neck"):
        del config[choice]
    (folder / CONFIG).write_text(json.dumps(config))
    assert load_weights(folder).config == before


# Broken folders


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_a_sentence(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=r"is not a weights folder: it needs config\.json and mgn\.safetensors"):
        load_weights(folder)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a weights folder"):
        load_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("classes", [2 * 10**9, -1, 1e30])
def test_classes_beyond_any_data_set_are_a_sentence(folder, classes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_classes": classes}))
    with pytest.raises(UserError, match=r"config\.json: num_classes: "):
        load_weights(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_tensors_are_a_sentence(folder, keep):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"mgn\.safetensors is (not a whole safetensors file|empty)"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"colour": "red"}, "colour"),
        ({"branches": []}, "branches"),
        ({"branches": [1, 9]}, "branches"),
        ({"height": "tall"}, "height"),
        ({"base_width": 7}, "base_width"),
        ({"backbone": "resnet1"}, "resnet1"),
    ],
)
def test_a_config_that_cannot_be_is_a_sentence_that_names_the_key(folder, change, sentence):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=sentence):
        load_weights(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object_is_a_sentence(folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_weights(folder)


def test_tensors_of_another_shape_are_named(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "reduced_width": 8}))
    with pytest.raises(
        UserError,
        match=r"reductions\.0\.0\.weight' has shape \[16, 128, 1, 1\], the model needs \[8, 128, 1, 1\]",
    ):
        load_weights(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / TENSORS)
    del tensors["trunk.0.weight"]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match=r"tensor 'trunk\.0\.weight' is missing"):
        load_weights(folder)


def test_a_tensor_too_many_is_named(folder):
    save_file({**load_file(folder / TENSORS), "odd": torch.zeros(1)}, folder / TENSORS)
    with pytest.raises(UserError, match="tensor 'odd' is not the model's"):
        load_weights(folder)
