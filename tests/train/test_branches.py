"""The branches: their copies, stripes, features and order, and the backbones that they may have."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_config
from torch import nn

from mgn_deploy.config import ModelConfig, stripe_rows
from mgn_deploy.errors import UserError
from mgn_deploy.train.model import MGN
from mgn_deploy.train.weights import new_model


def test_branch_copies_start_equal():
    mgn = MGN(small_config())
    first, *others = (branch.state_dict() for branch in mgn.branches)
    for other in others:
        for name in first:
            if not name.startswith("reductions"):
                assert torch.equal(first[name], other[name]), name


def test_changing_one_branch_leaves_the_others_as_they_are(model):
    images = torch.randn(2, 3, 96, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model.feature_maps(images)
        for parameter in model.branches[1].parameters():
            parameter.mul_(1.1)
        after = model.feature_maps(images)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_a_gradient_step_on_one_branchs_output_moves_that_branch_and_the_trunk_only():
    model = MGN(small_config())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model.train()(torch.randn(4, 3, 96, 32, generator=torch.Generator().manual_seed(1)))
    sum(stripe.square().sum() for stripe in output.stripes[:2]).backward()  # of Part-2
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".reductions")[0][:10] for name in moved if name.startswith("branches")} == {"branches.1"}
    assert any(name.startswith("trunk") for name in moved)
    assert not any(name.startswith("branches.1.reductions.0") for name in moved)


def test_no_tensor_is_shared_between_modules(model):
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(storages) == len(set(storages))


def test_reductions_start_different():
    weights = [reduction[0].weight for branch in MGN(small_config()).branches for reduction in branch.reductions]
    for index, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[index + 1 :])


def test_the_embedding_is_in_the_order_of_table_1(model):
    """f_g^G, f_g^P2, f_p0..1^P2, f_g^P3, f_p0..2^P3: found by silencing one reduction at a time."""
    width = model.config.reduced_width
    images = torch.randn(2, 3, 96, 32, generator=torch.Generator().manual_seed(3))
    places = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]
    with torch.inference_mode():
        whole = model(images).view(2, 8, width)
        assert (whole.sum(dim=2) > 0).all()
        for position, (branch, reduction) in enumerate(places):
            silent = copy.deepcopy(model)
            norm = silent.branches[branch].reductions[reduction][1]
            norm.weight.zero_()
            norm.bias.zero_()
            features = silent(images).view(2, 8, width)
            assert torch.equal(features[:, position], torch.zeros(2, width))
            kept = [other for other in range(8) if other != position]
            assert torch.equal(features[:, kept], whole[:, kept])


def test_stripes_are_numbered_from_the_top(model):
    branch = model.branches[2]
    map_ = torch.zeros(1, 4, 24, 8)
    for stripe in range(3):
        map_[:, :, 8 * stripe : 8 * stripe + 8] = stripe + 1
    assert [float(vector.amin()) for vector in branch.pool(map_)] == [3, 1, 2, 3]
    assert [float(vector.amax()) for vector in branch.pool(map_)] == [3, 1, 2, 3]


@pytest.mark.parametrize("height", [24, 12, 7, 5, 1])
@pytest.mark.parametrize("stripes", [2, 3, 4, 8])
def test_stripes_are_torchs_adaptive_max_pooling_also_where_rows_do_not_divide(height, stripes):
    map_ = torch.randn(2, 3, height, 4, generator=torch.Generator().manual_seed(height))
    expected = nn.functional.adaptive_max_pool2d(map_, (stripes, 1))[:, :, :, 0]
    branch = MGN(small_config(branches=(stripes,))).branches[0]
    pooled = torch.stack([vector.flatten(1) for vector in branch.pool(map_)[1:]], dim=2)
    assert torch.equal(pooled, expected)


def test_stripes_cover_every_row_evenly_where_they_divide():
    assert stripe_rows(24, 3) == [(0, 8), (8, 16), (16, 24)]
    assert stripe_rows(24, 2) == [(0, 12), (12, 24)]
    assert stripe_rows(24, 1) == [(0, 24)]


@pytest.mark.parametrize("branches", [(1,), (1, 2), (1, 3), (2, 4), (1, 2, 4), (1, 2, 3, 4), (3, 1)])
def test_any_branches_give_their_features(branches):
    config = small_config(branches=branches, num_classes=5)
    model = MGN(config)
    images = torch.randn(3, 3, 96, 32)
    features = sum(1 if stripes == 1 else 1 + stripes for stripes in branches)
    assert (config.features, config.dim) == (features, 4 * features)
    assert tuple(model.eval()(images).shape) == (3, 4 * features)
    output = model.train()(images)
    parts = sum(stripes for stripes in branches if stripes > 1)
    assert (len(output.pooled_globals), len(output.globals), len(output.stripes)) == (
        len(branches),
        len(branches),
        parts,
    )
    assert [tuple(logits.shape) for logits in output.logits] == [(3, 5)] * (len(branches) + parts)


@pytest.mark.parametrize(
    ("backbone", "base_width", "channels"),
    [
        ("resnet18", 64, 512),
        ("resnet50", 64, 2048),
        ("resnet101", 64, 2048),
        ("wide_resnet50_2", 64, 2048),
        ("resnet50", 32, 1024),
    ],
)
def test_other_resnets_are_configurations(backbone, base_width, channels):
    with torch.device("meta"):
        model = MGN(ModelConfig(backbone=backbone, base_width=base_width))
        maps = model.feature_maps(torch.zeros(1, 3, 192, 64))
    assert [tuple(one.shape) for one in maps] == [
        (1, channels, 6, 2),
        (1, channels, 12, 4),
        (1, channels, 12, 4),
    ]


def test_an_unknown_backbone_is_a_sentence_that_names_usable_ones():
    with pytest.raises(UserError, match=r"backbone 'resnet5' is none of .* resnet50,") as caught:
        MGN(ModelConfig(backbone="resnet5"))
    for name in str(caught.value).split("choose one of ")[1].split(", "):
        with torch.device("meta"):
            MGN(ModelConfig(backbone=name))


def test_another_kind_of_network_is_no_backbone():
    with pytest.raises(UserError, match="none of torchvision's ResNets"):
        MGN(ModelConfig(backbone="vgg16"))


def test_one_seed_gives_one_model():
    first, again, other = (new_model(small_config(), seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["trunk.0.weight"], other["trunk.0.weight"])


def test_making_a_model_leaves_torchs_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    new_model(small_config(), seed=7)
    assert torch.equal(torch.rand(3), expected)
