"""What public checkpoints have otherwise than the paper: IBN, stem, strides, pooling and necks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import randomise_norms, small_config
from torch import nn

from mgn_deploy.config import ModelConfig
from mgn_deploy.train.model import MGN, fold_batch_norms
from mgn_deploy.train.resnet import IBN, build_resnet

PUBLIC = {"ibn": "a", "stem_pool": "ceil", "global_stride": 1, "pooling": "gem", "neck": "relu_norm"}


def test_the_papers_choices_are_the_defaults():
    paper = {"ibn": "none", "stem_pool": "padded", "global_stride": 2, "pooling": "max", "neck": "relu"}
    assert ModelConfig(**paper) == ModelConfig()


@pytest.mark.parametrize("name", PUBLIC)
def test_another_choice_is_written_and_read(name):
    config = ModelConfig(**{name: PUBLIC[name]})
    assert config.model_dump()[name] == PUBLIC[name]
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_ibn_is_in_the_first_norm_of_every_block_before_layer4():
    with torch.device("meta"):
        model = MGN(ModelConfig(ibn="a"))
    found = {name for name, module in model.named_modules() if isinstance(module, IBN)}
    blocks = {f"trunk.4.{i}" for i in range(3)} | {f"trunk.5.{i}" for i in range(4)} | {"trunk.6"}
    blocks |= {f"branches.{branch}.layer3.{i}" for branch in range(3) for i in range(1, 6)}
    assert found == {f"{block}.bn1" for block in blocks}


def test_ibn_norms_half_the_channels_by_the_image_and_half_by_the_batches():
    ibn = IBN(6).eval()
    randomise_norms(ibn)
    maps = torch.randn(2, 6, 5, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = ibn(maps)
        assert torch.equal(found[:, 3:], ibn.BN(maps[:, 3:]))
    one = maps[1, 2].numpy().astype(np.float64)
    expected = (one - one.mean()) / np.sqrt(one.var() + 1e-5) * ibn.IN.weight[2].item() + ibn.IN.bias[2].item()
    np.testing.assert_allclose(found[1, 2].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 6), (9, 7), (8, 7)])
def test_the_ceil_stem_pools_windows_that_start_at_even_rows_and_columns(size):
    maps = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(2))
    found = build_resnet(ModelConfig(backbone="resnet18", base_width=8, stem_pool="ceil")).maxpool(maps)
    rows, columns = size[0] // 2, size[1] // 2
    assert tuple(found.shape[2:]) == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            window = maps[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            assert torch.equal(found[:, :, row, column], window.amax((2, 3)))


def test_a_global_branch_of_stride_1_has_maps_as_large_as_the_others():
    model = MGN(small_config(global_stride=1)).eval()
    assert [tuple(map_.shape[2:]) for map_ in model.feature_maps(torch.zeros(1, 3, 96, 32))] == [(6, 2)] * 3


def test_avg_pools_whole_map_and_stripes_by_their_means():
    branch = MGN(small_config(branches=(2,), pooling="avg")).branches[0]
    map_ = torch.arange(16.0).view(1, 1, 4, 4)
    assert [float(vector) for vector in branch.pool(map_)] == [7.5, 3.5, 11.5]


def test_gem_is_the_root_of_the_mean_power_with_a_power_for_each_feature():
    branch = MGN(small_config(branches=(2,), pooling="gem")).branches[0]
    branch.powers.data = torch.tensor([1.0, 2.0, 4.0])
    map_ = torch.tensor([3.0, 4.0, -5.0, 2.0]).view(1, 1, 2, 2)
    found = [vector.item() for vector in branch.pool(map_)]
    np.testing.assert_allclose(found, [9 / 4, (25 / 2) ** 0.5, (16 / 2) ** 0.25], rtol=1e-5)  # -5 counts as 1e-6


def test_necks_are_relu_nothing_or_relu_and_a_norm():
    kinds = {
        neck: [type(module).__name__ for module in MGN(small_config(neck=neck)).branches[0].reductions[0]]
        for neck in ("relu", "linear", "relu_norm")
    }
    assert kinds == {
        "relu": ["Conv2d", "BatchNorm2d", "ReLU"],
        "linear": ["Conv2d", "BatchNorm2d"],
        "relu_norm": ["Conv2d", "BatchNorm2d", "ReLU", "BatchNorm2d"],
    }


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_folding_with_ibn_and_another_neck_changes_nothing(backbone):
    model = MGN(small_config(backbone=backbone, **PUBLIC)).eval()
    randomise_norms(model)
    model = model.double()
    images = torch.randn(2, 3, 96, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folded = fold_batch_norms(model)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == [f"branches.{b}.reductions.{i}.3" for b in range(3) for i in range((1, 3, 4)[b])]
