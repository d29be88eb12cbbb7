"""What training starts from: a ResNet's file, torchvision's weights, another run's, or random numbers."""

from __future__ import annotations

import pickle
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from bomb import Bomb
from conftest import mgn_deploy
from safetensors.torch import save_file
from small_models import TINY

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.train.weights import (
    fine_tuned_model,
    load_weights,
    new_model,
    write_untrained_weights,
)

# ImageNet weights from a file


@pytest.fixture(scope="module")
def resnet18_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    return torchvision.models.resnet18(weights=None).state_dict()


FULL = ModelConfig(backbone="resnet18", height=96, width=32, reduced_width=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_resnets_file_starts_the_trunk_and_every_branch(tmp_path, resnet18_state, suffix):
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(resnet18_state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in resnet18_state.items()}, path)
    model = new_model(FULL, path)
    trunk = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5}
    checked = 0
    for name, tensor in resnet18_state.items():
        stage, _, rest = name.partition(".")
        if stage in trunk:
            assert torch.equal(model.trunk[trunk[stage]].state_dict()[rest], tensor), name
        elif name.startswith("layer3.0."):
            assert torch.equal(model.trunk[6].state_dict()[name.removeprefix("layer3.0.")], tensor), name
        elif stage == "layer3":
            block, _, inside = rest.partition(".")
            for branch in model.branches:
                assert torch.equal(branch.layer3[int(block) - 1].state_dict()[inside], tensor), name
        elif stage == "layer4":
            for branch in model.branches:
                assert torch.equal(branch.layer4.state_dict()[rest], tensor), name
        else:
            assert stage == "fc"
            continue
        checked += 1
    assert checked == len(resnet18_state) - 2


def test_another_networks_file_is_refused_by_name(tmp_path, resnet18_state):
    torch.save(resnet18_state, tmp_path / "r.pth")
    with pytest.raises(
        UserError,
        match=r"r\.pth: not the state dict of torchvision's resnet34 \(\d+ tensors differ, first 'layer1",
    ):
        new_model(ModelConfig(backbone="resnet34"), tmp_path / "r.pth")


def test_a_network_of_other_widths_is_refused_by_its_first_tensor(tmp_path, resnet18_state):
    torch.save(resnet18_state, tmp_path / "r.pth")
    with pytest.raises(UserError, match=r"first 'conv1\.weight'"):
        new_model(TINY, tmp_path / "r.pth")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, resnet18_state, writer):
    state = {**resnet18_state, "conv1.weight": Bomb(tmp_path / "exploded")}
    if writer == "torch":
        torch.save(state, tmp_path / "r.pth")
    else:
        (tmp_path / "r.pth").write_bytes(pickle.dumps({"conv1.weight": Bomb(tmp_path / "exploded")}))
    with pytest.raises(UserError, match="could run code"):
        new_model(FULL, tmp_path / "r.pth")
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_of_that_test_would_explode(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x80\x02"])
def test_a_file_that_is_no_weights_is_a_sentence(tmp_path, content):
    (tmp_path / "r.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.pth (cannot be read as weights|is empty|is text)"):
        new_model(FULL, tmp_path / "r.pth")


def test_a_checkpoint_that_nests_its_tensors_is_read(tmp_path, resnet18_state):
    nested = {"state_dict": {f"module.{name}": tensor for name, tensor in resnet18_state.items()}, "epoch": 3}
    torch.save(nested, tmp_path / "r.pth")
    model = new_model(FULL, tmp_path / "r.pth")
    assert torch.equal(model.trunk[0].weight, resnet18_state["conv1.weight"])


def test_a_file_that_is_not_there_is_a_sentence_with_the_choices(tmp_path):
    with pytest.raises(UserError, match=r"^--init .*nowhere.pth: no such file; it takes random, imagenet, or"):
        new_model(FULL, tmp_path / "nowhere.pth")


# ImageNet weights from torchvision


def refuse_to_connect(monkeypatch, cache: Path) -> None:
    """A proxy at a port where nothing listens: with or without a network the download fails at once."""
    monkeypatch.setenv("TORCH_HOME", str(cache))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # one per process, and it keeps the proxies of its first use


def test_without_a_network_imagenet_is_a_sentence_with_the_address_and_the_way_round(monkeypatch, tmp_path):
    refuse_to_connect(monkeypatch, tmp_path)
    start = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"fetch https://download\.pytorch\.org/models/resnet18-\w+\.pth elsewhere .*--init FILE",
    ):
        new_model(FULL, "imagenet")
    assert time.monotonic() - start < 10
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file()
    ]  # nothing that a later run would take for weights


def test_a_damaged_file_in_torchs_cache_is_a_sentence(monkeypatch, tmp_path):
    refuse_to_connect(monkeypatch, tmp_path)
    place = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"<html>please log in</html>")
    with pytest.raises(UserError, match="torchvision's ImageNet weights of resnet18 cannot be"):
        new_model(FULL, "imagenet")


def test_a_pickle_in_torchs_cache_is_not_run(monkeypatch, tmp_path, resnet18_state):
    refuse_to_connect(monkeypatch, tmp_path)
    place = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    torch.save({**resnet18_state, "conv1.weight": Bomb(tmp_path / "exploded")}, place)
    with pytest.raises(UserError):
        new_model(FULL, "imagenet")
    assert not (tmp_path / "exploded").exists()


def test_init_writes_weights_that_load(tmp_path):
    done = mgn_deploy(
        "init",
        "-o",
        tmp_path / "w",
        "--backbone",
        "resnet18",
        "--size",
        "96x32",
        "--branches",
        "1,2",
        "--init",
        "random",
    )
    assert done.exit_code == 0, done.stderr
    model = load_weights(tmp_path / "w")
    assert (model.config.backbone, model.config.height, model.config.width, model.config.branches) == (
        "resnet18",
        96,
        32,
        (1, 2),
    )


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--size", "384", "384x128"),
        ("--size", "8x8", "height"),
        ("--branches", "1,x", "1,2,3"),
        ("--branches", "0", "branches"),
        ("--backbone", "vgg16", "resnet50"),
        ("--init", "nowhere.pth", "no such file"),
    ],
)
def test_init_refuses_what_it_cannot_make_in_a_sentence(tmp_path, option, value, word):
    arguments = {"--backbone": "resnet18", "--size": "96x32", "--init": "random", option: value}
    done = mgn_deploy("init", "-o", tmp_path / "w", *(part for pair in arguments.items() for part in pair))
    assert done.exit_code == 2
    assert word in done.stderr
    assert not (tmp_path / "w").exists()


def test_weights_from_a_resnets_file_get_no_noise(tmp_path, resnet18_state):
    torch.save(resnet18_state, tmp_path / "resnet18.pth")
    write_untrained_weights(tmp_path / "w", FULL, tmp_path / "resnet18.pth")
    expected = new_model(FULL, tmp_path / "resnet18.pth").state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_weights(tmp_path / "w").state_dict().items()
    )


def test_fine_tuning_for_a_size_that_cannot_be_is_a_sentence(weights):
    with pytest.raises(UserError, match="height: Input should be greater than or equal to 32"):
        fine_tuned_model(weights, 7, 8, 64)


def test_fine_tuning_on_other_people_starts_from_every_tensor_but_new_classifiers(weights):
    model, before = fine_tuned_model(weights, 7, 192, 64), load_weights(weights).state_dict()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after.keys() - before.keys() == {f"classifiers.{number}.weight" for number in range(8)}
    assert (model.config.num_classes, model.config.height, model.config.width) == (7, 192, 64)


def test_random_weights_have_no_branch_that_is_a_copy_of_another(tmp_path):
    """An engine could compute one of such branches, and its speed would not be that of trained weights."""
    write_untrained_weights(tmp_path / "w", TINY, "random")
    branches = [branch.state_dict() for branch in load_weights(tmp_path / "w").branches]
    for name in ("layer3.1.conv1.weight", "layer4.0.conv1.weight", "layer4.1.bn2.weight"):
        first, second, third = (branch[name] for branch in branches)
        assert not torch.equal(first, second), name
        assert not torch.equal(second, third), name
