"""The network against the paper (sections 3.1, 4.1, Table 1), torchvision and plain arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mgn_deploy.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, stripe_rows
from mgn_deploy.errors import UserError
from mgn_deploy.train.model import MGN, Embedding, MGNOutput, fold_batch_norms
from mgn_deploy.train.resnet import IBN, build_resnet
from mgn_deploy.train.weights import load_weights, new_model

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine


def small_config(**changes) -> ModelConfig:
    return ModelConfig(
        **{"backbone": "resnet18", "base_width": 8, "reduced_width": 4, "height": 96, "width": 32, **changes}
    )


def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.7, 1.3, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)


def random_pixels(count: int, height: int = 96, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def paper() -> MGN:
    """The paper's MGN without storage: shapes and hyperparameters only."""
    with torch.device("meta"):
        return MGN(ModelConfig(num_classes=751)).eval()


@pytest.fixture
def model(weights) -> MGN:
    return load_weights(weights)


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


# Branches


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


# What public checkpoints have otherwise

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


# Folding


def test_folding_the_norms_changes_nothing(model):
    model = model.double()
    images = torch.randn(2, 3, 96, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(fold_batch_norms(model)(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_folding_leaves_no_norm(backbone):
    folded = fold_batch_norms(MGN(small_config(backbone=backbone)))
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]


def test_folding_leaves_the_original_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    folded = fold_batch_norms(model)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in folded.parameters()}


# Embedding


def test_the_embedding_is_the_normalised_mean_of_the_features_of_image_and_mirror(model):
    """Section 4.1, written out in NumPy around the bare network."""
    pixels = random_pixels(3)

    def features(images: np.ndarray) -> np.ndarray:
        scaled = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        with torch.inference_mode():
            return model(torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))).numpy()

    averaged = (features(pixels.numpy()) + features(pixels.numpy()[:, :, ::-1])) / 2
    expected = averaged / np.linalg.norm(averaged, axis=1, keepdims=True)
    with torch.inference_mode():
        np.testing.assert_allclose(Embedding(model)(pixels).numpy(), expected, atol=1e-5)


def test_embeddings_have_length_one(model):
    with torch.inference_mode():
        for flip in (True, False):
            lengths = Embedding(model, flip)(random_pixels(4)).norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones(4))


def test_a_mirrored_image_has_the_same_embedding(model):
    pixels = random_pixels(3)
    with torch.inference_mode():
        torch.testing.assert_close(Embedding(model)(pixels.flip(2)), Embedding(model)(pixels), rtol=0, atol=1e-6)


def test_without_the_mirror_average_a_mirrored_image_has_another_embedding(model):
    pixels = random_pixels(3)
    with torch.inference_mode():
        plain = Embedding(model, flip=False)
        assert (plain(pixels.flip(2)) - plain(pixels)).abs().max() > 1e-3


def test_the_order_of_the_colours_matters(model):
    pixels = random_pixels(3)
    with torch.inference_mode():
        assert (Embedding(model)(pixels.flip(3)) - Embedding(model)(pixels)).abs().max() > 1e-3


def test_normalisation_is_imagenets_on_the_0_to_1_scale(model):
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(Embedding(model, flip=False).normalise(pixels).flatten().numpy(), expected, rtol=1e-5)


def test_normalisation_is_the_configs():
    model = MGN(small_config(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    pixels = torch.tensor([[[[0, 255, 255]]]], dtype=torch.uint8)
    np.testing.assert_allclose(Embedding(model, flip=False).normalise(pixels).flatten().numpy(), [-1, 3, 1], rtol=1e-6)


def test_mirrors_come_last_in_the_batch(model):
    pixels = random_pixels(2)
    normalised = Embedding(model).normalise(pixels)
    assert torch.equal(normalised[2:], normalised[:2].flip(3))
    assert torch.equal(normalised[:2], Embedding(model, flip=False).normalise(pixels))


def test_an_images_embedding_does_not_depend_on_its_batch(model):
    pixels = random_pixels(4)
    with torch.inference_mode():
        together = Embedding(model)(pixels)
        alone = torch.cat([Embedding(model)(one[None]) for one in pixels])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
