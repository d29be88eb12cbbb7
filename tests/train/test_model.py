"""The network against the paper (sections 3.1, 4.1, Table 1), torchvision and plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from small_models import randomise_norms, small_config
from torch import nn

from mgn_deploy.config import ModelConfig
from mgn_deploy.train.model import MGN, MGNOutput
from mgn_deploy.train.resnet import build_resnet


@pytest.fixture(scope="module")
def paper() -> MGN:
    """The paper's MGN without storage: shapes and hyperparameters only."""
    with torch.device("meta"):
        return MGN(ModelConfig(num_classes=751)).eval()


# The paper's figures


def test_the_papers_network_has_68_8_million_parameters_without_its_classifiers(paper):
    everything, classifiers = (sum(one.numel() for one in part.parameters()) for part in (paper, paper.classifiers))
    assert everything - classifiers == 68_807_744
    assert classifiers == (3 * 2048 + 5 * 256) * 751  # no bias: equation 1


def test_the_papers_maps_are_12x4_24x8_24x8(paper):
    maps = paper.feature_maps(torch.zeros(1, 3, 384, 128, device="meta"))
    assert [tuple(one.shape) for one in maps] == [(1, 2048, 12, 4), (1, 2048, 24, 8), (1, 2048, 24, 8)]


def test_the_papers_embedding_is_8_x_256(paper):
    assert tuple(paper(torch.zeros(3, 3, 384, 128, device="meta")).shape) == (3, 2048)


def test_the_trunk_ends_after_res_conv4_1(paper):
    assert tuple(paper.trunk(torch.zeros(1, 3, 384, 128, device="meta")).shape) == (1, 1024, 24, 8)
    resnet = torchvision.models.resnet50(weights=None)
    assert len(paper.trunk[4]) == len(resnet.layer1)
    assert len(paper.trunk[5]) == len(resnet.layer2)
    assert isinstance(paper.trunk[6], torchvision.models.resnet.Bottleneck)
    assert len(paper.trunk) == 7
    assert [len(branch.layer3) for branch in paper.branches] == [len(resnet.layer3) - 1] * 3
    assert [len(branch.layer4) for branch in paper.branches] == [len(resnet.layer4)] * 3


def test_only_the_global_branch_strides_in_layer4(paper):
    strides = [(branch.layer4[0].conv2.stride, branch.layer4[0].downsample[0].stride) for branch in paper.branches]
    assert strides == [((2, 2), (2, 2)), ((1, 1), (1, 1)), ((1, 1), (1, 1))]


def test_part_branches_stride_nowhere(paper):
    strides = {
        module.stride for branch in paper.branches[1:] for module in branch.modules() if isinstance(module, nn.Conv2d)
    }
    assert strides == {(1, 1)}


def test_each_reduction_is_a_1x1_convolution_without_bias_a_norm_and_relu(paper):
    reductions = [reduction for branch in paper.branches for reduction in branch.reductions]
    assert len(reductions) == 8
    for conv, norm, relu in reductions:
        assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.bias) == (2048, 256, (1, 1), None)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(relu, nn.ReLU)


# Against torchvision's own forward pass


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_branches_maps_are_torchvisions_last_maps(backbone):
    resnet = build_resnet(ModelConfig(backbone=backbone, base_width=8)).eval()
    randomise_norms(resnet)
    mgn = MGN(small_config(backbone=backbone), copy.deepcopy(resnet)).eval()
    images = torch.randn(2, 3, 96, 32, generator=torch.Generator().manual_seed(1))

    unstrided = copy.deepcopy(resnet)
    for conv in (unstrided.layer4[0].conv1, unstrided.layer4[0].conv2, unstrided.layer4[0].downsample[0]):
        conv.stride = (1, 1)
    with torch.inference_mode():
        expected = [torchvision_map(net, images) for net in (resnet, unstrided, unstrided)]
        maps = mgn.feature_maps(images)
    assert [tuple(one.shape[2:]) for one in maps] == [(3, 1), (6, 2), (6, 2)]
    for one, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, other)


def torchvision_map(resnet: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What torchvision's forward does before its average pooling."""
    maps = []
    hook = resnet.avgpool.register_forward_hook(lambda module, inputs, output: maps.append(inputs[0]))
    resnet(images)
    hook.remove()
    return maps[0]


# What the losses take


def test_training_gives_globals_before_and_after_reduction_and_reduced_stripes():
    config = small_config(num_classes=6)
    model = MGN(config).train()
    images = torch.randn(4, 3, 96, 32)
    output = model(images)
    assert isinstance(output, MGNOutput)
    assert [vector.shape[1] for vector in output.pooled_globals] == [64, 64, 64]
    assert [vector.shape[1] for vector in output.globals] == [4, 4, 4]
    assert [vector.shape[1] for vector in output.stripes] == [4] * 5
    for classifier, vector, logits in zip(
        model.classifiers, output.pooled_globals + output.stripes, output.logits, strict=True
    ):
        assert torch.equal(classifier(vector), logits)


def test_pooled_globals_are_the_maxima_of_the_maps():
    model = MGN(small_config()).eval()
    images = torch.randn(2, 3, 96, 32)
    maps = model.feature_maps(images)
    model.training = True  # the output of training with the norms of inference, so that both passes agree
    for vector, map_ in zip(model(images).pooled_globals, maps, strict=True):
        assert torch.equal(vector, map_.amax((2, 3)))
