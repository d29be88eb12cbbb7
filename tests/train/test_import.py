"""Public checkpoints: the imported model's embedding is the original's, and nothing in a file is passed over in
silence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from bomb import Bomb
from conftest import mgn_deploy
from public_mgns import RESNET18, Basic, FastReid, ThreeParts, randomise
from safetensors.torch import save_file
from torch import nn

from mgn_deploy.bundle.bundle import Bundle
from mgn_deploy.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.importing import detect, import_checkpoint
from mgn_deploy.train.model import MGN, Embedding
from mgn_deploy.train.weights import load_weights, save_weights, weights_hash

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine

BY_BRANCH = tuple(range(8))  # our order, and levyfan's
GLOBALS_FIRST = (0, 1, 3, 4, 2, 5, 6, 7)  # our features as numbers of the other networks'


class Scaled(nn.Module):
    """Raw pixels in, for a network that takes ImageNet-normalised ones of 0 to 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.network((pixels / 255 - mean) / std)


def saved(content: object, folder: Path, name: str = "public.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def random_pixels(height: int = 384, width: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)


def worst_difference(
    original: nn.Module, weights: Path, *, flip: bool = False, order: tuple[int, ...] = GLOBALS_FIRST
) -> float:
    """Between the unit embeddings of the imported model and the original's, its features put in our order."""
    model = load_weights(weights)
    pixels = random_pixels(model.config.height, model.config.width)
    with torch.inference_mode():
        found = Embedding(model, flip)(pixels)
        images = pixels.permute(0, 3, 1, 2).float()
        features = original(images) + original(images.flip(3)) if flip else original(images)
    expected = nn.functional.normalize(features.view(2, 8, -1)[:, order].flatten(1))
    assert expected.std() > 0.05
    return float((found - expected).abs().max())


# The embedding is the original's


def test_fastreid_with_pool_and_bnneck(tmp_path):
    original = randomise(FastReid(1))
    assert len(original.state_dict()) == 768 + 2
    report = import_checkpoint(saved({"model": original.state_dict()}, tmp_path), tmp_path / "w")
    assert (report.source, report.read["pooling"], report.read["ibn"]) == ("fastreid", "gem", "a")
    config = load_weights(tmp_path / "w").config
    assert (config.global_stride, config.stem_pool, config.neck) == (1, "padded", "relu_norm")
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_fastreid_with_embedding_heads(tmp_path):
    original = randomise(FastReid(3))
    assert len(original.state_dict()) == 728 + 2
    report = import_checkpoint(saved({"model": original.state_dict()}, tmp_path), tmp_path / "w")
    assert report.source == "fastreid"
    assert len(set(report.read["powers"])) == 8
    config = load_weights(tmp_path / "w").config
    assert (config.global_stride, config.stem_pool, config.neck) == (1, "ceil", "linear")
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_fastreid_of_the_first_configuration_pools_by_maximum_and_strides(tmp_path):
    original = randomise(FastReid(1, pooling="max", stride=2, ibn=False))
    report = import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w")
    assert {one.what: one.value for one in report.assumed} == {
        "input size": "384x128",
        "pooling": "max",
        "global stride": 2,
        "stem pool": "padded",
    }
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_fastreid_at_another_size_and_with_another_depth(tmp_path):
    original = randomise(FastReid(3, blocks=(3, 4, 23, 3)))
    report = import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w", size=(96, 48))
    assert report.read["backbone"] == "resnet101"
    assert load_weights(tmp_path / "w").config.width == 48
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_fastreid_with_blocks_of_two_convolutions(tmp_path):
    original = randomise(FastReid(1, blocks=RESNET18, kind=Basic))
    report = import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w", size=(96, 48))
    assert report.read["backbone"] == "resnet18"
    assert worst_difference(original, tmp_path / "w") < 1e-5


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_fastreid_without_powers_pools_as_the_user_says(tmp_path, pooling):
    original = randomise(FastReid(3, pooling=pooling))
    path = saved(original.state_dict(), tmp_path)
    with pytest.raises(UserError, match="how it pools cannot be told from it: give --pool max, avg or gem"):
        import_checkpoint(path, tmp_path / "w")
    import_checkpoint(path, tmp_path / "w", pooling=pooling, size=(96, 32))
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_a_generalised_mean_of_fixed_power_is_of_the_third(tmp_path):
    original = randomise(FastReid(3, pooling="gem"))
    for name in [name for name, _ in original.named_parameters() if name.endswith("pool_layer.p")]:
        original.get_parameter(name).data.fill_(3)
    state = {name: tensor for name, tensor in original.state_dict().items() if not name.endswith("pool_layer.p")}
    report = import_checkpoint(saved(state, tmp_path), tmp_path / "w", pooling="gem", size=(96, 32))
    assert ("power of the generalised mean", 3.0) in [(one.what, one.value) for one in report.assumed]
    assert worst_difference(original, tmp_path / "w") < 1e-5


def test_seathiefwang_with_its_mirror_average(tmp_path):
    original = randomise(ThreeParts("backone", "avg"))
    assert len(original.state_dict()) == 682
    report = import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w")
    assert report.source == "seathiefwang"
    assert load_weights(tmp_path / "w").config.pooling == "avg"
    assert worst_difference(Scaled(original), tmp_path / "w", flip=True) < 1e-5


def test_levyfan_whose_features_are_in_our_order(tmp_path):
    original = randomise(ThreeParts("backbone", "max", wide_classifiers=True, by_branch=True))
    assert len(original.state_dict()) == 682
    assert import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w").source == "levyfan"
    assert worst_difference(Scaled(original), tmp_path / "w", order=BY_BRANCH) < 1e-5


def test_one_reduction_for_all_features_is_copied(tmp_path):
    original = randomise(ThreeParts("backbone", "max", shared_reduction=True))
    assert len(original.state_dict()) == 640
    assert import_checkpoint(saved(original.state_dict(), tmp_path), tmp_path / "w").source == "gnayuohz"
    assert worst_difference(Scaled(original), tmp_path / "w") < 1e-5


def test_a_fork_of_levyfan_pools_as_the_user_says(tmp_path):
    original = randomise(ThreeParts("backbone", "avg", by_branch=True))
    path = saved(original.state_dict(), tmp_path)
    with pytest.raises(UserError, match=r"a fork of levyfan/reid-mgn, and how it pools cannot be told"):
        import_checkpoint(path, tmp_path / "w")
    import_checkpoint(path, tmp_path / "w", pooling="avg")
    assert worst_difference(Scaled(original), tmp_path / "w", order=BY_BRANCH) < 1e-5


@pytest.mark.parametrize("network", [FastReid(3), ThreeParts("backone", "avg")], ids=["fastreid", "seathiefwang"])
def test_choices_that_no_tensor_tells_make_another_model(tmp_path, network):
    """The tests above would not see a wrong stride, alignment or pooling if these changed nothing."""
    original = randomise(network)
    path = saved(original.state_dict(), tmp_path)
    raw = original if isinstance(original, FastReid) else Scaled(original)
    choices: list[dict] = [{"global_stride": 2, "size": (96, 32)}, {"stem_pool": "padded", "size": (96, 32)}]
    if not isinstance(original, FastReid):
        choices = [{"global_stride": 1}, {"stem_pool": "ceil"}, {"pooling": "max"}]
    for choice in choices:
        report = import_checkpoint(path, tmp_path / "w", **choice)
        assert report.given == choice
        assert not {name.replace("_", " ") for name in choice} & {one.what for one in report.assumed}
        assert worst_difference(raw, tmp_path / "w") > 1e-3


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: FastReid(1, 64, 256, classes=751, pixel_buffers=False), 768),
        (lambda: FastReid(3, 64, 256, classes=0, pixel_buffers=False), 728),
        (lambda: ThreeParts("backone", "avg", 64, 256, classes=751), 682),
    ],
    ids=["pool and bnneck", "embedding heads", "seathiefwang"],
)
def test_at_full_width_every_tensor_of_ours_is_named_and_of_their_shape(build, count):
    with torch.device("meta"):
        theirs = build().state_dict()
    assert len(theirs) == count
    source = detect(theirs)
    with torch.device("meta"):
        pooling = "gem" if source.powers else "avg"
        ibn = "a" if source.name == "fastreid" else "none"
        expected = MGN(ModelConfig(ibn=ibn, pooling=pooling, neck=source.neck)).state_dict()
    names = {own: source.theirs(own) for own in expected if not own.endswith(".powers")}
    assert {own: theirs[name].shape for own, name in names.items()} == {own: expected[own].shape for own in names}
    assert theirs.keys() - names.values() <= {*source.dropped, *source.powers}


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


# Refusals


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
