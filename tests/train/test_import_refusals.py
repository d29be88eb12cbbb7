"""Nothing in a public checkpoint is passed over in silence: what does not fit is refused and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from bomb import Bomb
from conftest import mgn_deploy
from public_files import saved, worst_difference
from public_mgns import FastReid, ThreeParts, randomise
from torch import nn

from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.importing import import_checkpoint


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return randomise(FastReid(3)).state_dict()


def assert_refused(path: Path, *words: str, options: tuple[object, ...] = ()) -> None:
    """One sentence that names the file, exit 2, and nothing written."""
    done = mgn_deploy("import", path, "-o", path.parent / "refused", *options)
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in (*words, str(path)):
        assert word in done.stderr
    assert not (path.parent / "refused").exists()


def test_an_odd_tensor_is_named(state, tmp_path):
    odd = {**state, "b1_head.attention.weight": torch.zeros(3), "backbone.7.0.conv1.weight": torch.zeros(1)}
    assert_refused(saved(odd, tmp_path), "has b1_head.attention.weight, backbone.7.0.conv1.weight, which fast-reid MGN")


def test_missing_tensors_are_named_as_the_source_names_them(state, tmp_path):
    gone = ("b22_head.bottleneck.1.running_mean", "b3.0.2.conv2.weight", "b33_head.pool_layer.p", "pixel_std")
    assert_refused(saved({name: tensor for name, tensor in state.items() if name not in gone}, tmp_path), *gone)


def test_many_missing_tensors_are_counted(state, tmp_path):
    few = {name: tensor for name, tensor in state.items() if not name.startswith("b3_head") and "b3.1" not in name}
    assert_refused(saved(few, tmp_path), "lacks b3.1.0.conv1.weight", "more")


def test_a_missing_block_is_told_by_the_blocks_that_are_there(state, tmp_path):
    few = {name: tensor for name, tensor in state.items() if not name.startswith("b1.0.4.")}
    assert_refused(saved(few, tmp_path), "(3, 4, 5, 3) blocks", "no ResNet-18, 34, 50, 101 or 152")


def test_a_shape_that_does_not_fit_is_named(state, tmp_path):
    wrong = {**state, "b2.1.1.conv2.weight": torch.zeros(64, 64, 1, 1)}
    assert_refused(saved(wrong, tmp_path), "b2.1.1.conv2.weight has shape [64, 64, 1, 1]", "[64, 64, 3, 3]")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("backbone.1.bias", float("nan"), "not finite"),
        ("b3.1.0.bn2.running_var", -1.0, "negative variances"),
        ("b31_head.pool_layer.p", 0.0, "one positive number"),
        ("pixel_std", 0.0, "not positive"),
    ],
)
def test_values_that_no_trained_network_has_are_refused(state, tmp_path, name, value, words):
    broken = {**state, name: torch.full_like(state[name], value)}
    assert_refused(saved(broken, tmp_path), name, words)


def test_integers_where_weights_should_be_are_refused(state, tmp_path):
    quantised = {**state, "backbone.0.weight": torch.zeros(8, 3, 7, 7, dtype=torch.int8)}
    assert_refused(saved(quantised, tmp_path), "backbone.0.weight is a tensor of torch.int8")


def test_powers_and_another_pooling_contradict(state, tmp_path):
    assert_refused(saved(state, tmp_path), "--pool max", "generalised mean", options=("--pool", "max"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "256x128"), "multiple of 96"),
        (("--from", "levyfan"), "use --from fastreid"),
    ],
)
def test_options_that_cannot_be_are_refused(state, tmp_path, options, words):
    assert_refused(saved(state, tmp_path), words, options=options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"global_stride": 3}, "global_stride: Input should be 1 or 2"),
        ({"stem_pool": "tight"}, "stem_pool: Input should be 'padded' or 'ceil'"),
        ({"source": "torchreid"}, "--from torchreid: choose one of auto, fastreid, seathiefwang, levyfan, gnayuohz"),
        ({"size": (96, 8)}, "width: Input should be greater than or equal to 16"),
    ],
)
def test_the_library_refuses_choices_that_cannot_be(state, tmp_path, arguments, words):
    with pytest.raises(UserError, match=f"public.pth: {words}"):
        import_checkpoint(saved(state, tmp_path), tmp_path / "w", **arguments)
    assert not (tmp_path / "w").exists()


def test_a_size_that_is_none_is_refused(state, tmp_path):
    done = mgn_deploy("import", saved(state, tmp_path), "-o", tmp_path / "w", "--size", "big")
    assert (done.exit_code, done.stderr) == (2, "mgn-deploy: --size big: sizes are like 384x128\n")


def test_stripes_of_unequal_rows_would_not_be_the_originals(state, tmp_path):
    """Why such heights are refused: fast-reid cuts 8 rows into 3, 3 and 2, and ours share rows."""
    original = FastReid(3)
    original.load_state_dict(state)
    import_checkpoint(saved(state, tmp_path), tmp_path / "w")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    (tmp_path / "w" / "config.json").write_text(json.dumps({**config, "height": 128, "width": 32}))
    assert worst_difference(original.eval(), tmp_path / "w") > 1e-3


OTHER_NETWORKS = {
    "ReductionHead": (lambda s: {**s, "b1_head.bnneck.weight": torch.ones(6)}, "ReductionHead"),
    "without bnneck": (
        lambda s: {name: tensor for name, tensor in s.items() if ".bottleneck.1." not in name},
        "WITH_BNNECK False",
    ),
    "squeeze and excitation": (
        lambda s: {**s, "backbone.4.0.se.fc.0.weight": torch.ones(1)},
        "squeeze-and-excitation blocks (backbone.4.0.se.fc.0.weight)",
    ),
    "group norm": (
        lambda s: {name: tensor for name, tensor in s.items() if "running_" not in name},
        "no running statistics (GroupNorm)",
    ),
    "fast-reid baseline": (
        lambda s: {"backbone.conv1.weight": torch.zeros(1), "heads.bottleneck.0.weight": torch.zeros(1)},
        "a fast-reid baseline",
    ),
    "layumi's baseline": (
        lambda s: {"model.conv1.weight": torch.zeros(1), "classifier.add_block.0.weight": torch.zeros(1)},
        "layumi/Person_reID_baseline_pytorch, which has no MGN",
    ),
    "layumi's PCB": (
        lambda s: {"model.conv1.weight": torch.zeros(1), "classifier0.add_block.0.weight": torch.zeros(1)},
        "layumi/Person_reID_baseline_pytorch, which has no MGN",
    ),
    "ours": (lambda s: {"trunk.0.weight": torch.zeros(1), "branches.0.x": torch.zeros(1)}, "mgn-deploy's own model"),
    "something else": (
        lambda s: {f"layer.{i}": torch.zeros(1) for i in range(9)},
        "layer.0, layer.1, layer.2, layer.3, layer.4",
    ),
}


@pytest.mark.parametrize("kind", OTHER_NETWORKS)
def test_other_networks_are_refused_by_name(state, tmp_path, kind):
    change, words = OTHER_NETWORKS[kind]
    assert_refused(saved(change(state), tmp_path), words)


def test_a_bare_resnet_is_sent_to_init(tmp_path):
    assert_refused(
        saved(torchvision.models.resnet18(weights=None).state_dict(), tmp_path), "mgn-deploy init --init FILE"
    )


def test_branches_that_were_never_trained_are_refused(tmp_path):
    single = randomise(ThreeParts("backbone", "max", wide_classifiers=True)).state_dict()
    for name, tensor in single.items():
        if name.endswith("num_batches_tracked") and not name.startswith(("backbone.", "p1.", "reduction_0.")):
            tensor.zero_()
    assert_refused(saved(single, tmp_path), "branches p2, p3 were never trained")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(state, tmp_path, writer):
    path = tmp_path / "public.pth"
    content = {"model": state, "metric": Bomb(tmp_path / "exploded")}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"metric": Bomb(tmp_path / "exploded")}, protocol=2))
    assert_refused(path, "holds Python objects" if writer == "torch" else "public.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_module_is_refused_with_the_way_round(tmp_path):
    assert_refused(
        saved(nn.Linear(2, 2), tmp_path),
        "torch.nn.modules.linear.Linear",
        "save `model.state_dict()` with torch.save where it was made",
    )


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x80\x02", b"<html>please log in</html>"])
@pytest.mark.parametrize("name", ["public.pth", "public.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name)


@pytest.mark.parametrize("keep", [100, 100_000, -1])
def test_a_truncated_file_is_refused(state, tmp_path, keep):
    path = saved(state, tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(path, "damaged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors, but epoch"),
        ({1: torch.zeros(1)}, "under 1"),
        (torch.zeros(2), "holds a Tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, words):
    assert_refused(saved(content, tmp_path), words)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere.pth", "no such file")


def test_a_folder_of_something_else_is_not_replaced(state, tmp_path):
    path = saved(state, tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="choose another path"):
        import_checkpoint(path, tmp_path / "w")
    assert (tmp_path / "w" / "thesis.txt").exists()
