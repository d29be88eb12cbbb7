"""Folding changes nothing, and the embedding is the normalised mean over image and mirror."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import small_config
from torch import nn

from mgn_deploy.config import IMAGENET_MEAN, IMAGENET_STD
from mgn_deploy.train.model import MGN, Embedding, fold_batch_norms


def random_pixels(count: int, height: int = 96, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


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
