"""Public networks: the imported model's embedding is the original's."""

from __future__ import annotations

import pytest
import torch
from public_files import saved, worst_difference
from public_mgns import RESNET18, Basic, FastReid, ThreeParts, randomise
from torch import nn

from mgn_deploy.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.train.importers.importing import detect, import_checkpoint
from mgn_deploy.train.model import MGN
from mgn_deploy.train.weights import load_weights

BY_BRANCH = tuple(range(8))  # our order, and levyfan's


class Scaled(nn.Module):
    """Raw pixels in, for a network that takes ImageNet-normalised ones of 0 to 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.network((pixels / 255 - mean) / std)


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


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return randomise(FastReid(3)).state_dict()
