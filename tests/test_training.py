"""Batches, the loop, and the accuracy straight from PyTorch."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from mgn_deploy.train.data import IdentitySampler, TrainingSet
from mgn_deploy.train.evaluate import evaluate_model
from mgn_deploy.train.trainer import Schedule, Step, fit
from mgn_deploy.train.weights import load_weights, new_model
from PIL import Image

from mgn_deploy.config import ModelConfig
from mgn_deploy.drawn import draw_market1501
from mgn_deploy.embedder import Embedder
from mgn_deploy.errors import UserError
from mgn_deploy.market1501 import LabelledImage, Market1501, open_market1501
from mgn_deploy.ranking import evaluate_embeddings

torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it gives, much more on a busy machine

HEIGHT, WIDTH = 96, 32


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Market1501:
    root = tmp_path_factory.mktemp("drawn") / "people"
    draw_market1501(root, train_identities=5, test_identities=3)
    return open_market1501(root)


@pytest.fixture(scope="module")
def crops(people) -> TrainingSet:
    return TrainingSet(people.train, HEIGHT, WIDTH)


def untrained(classes: int, **changes):
    config = ModelConfig(
        backbone="resnet18", base_width=8, reduced_width=8, height=HEIGHT, width=WIDTH, num_classes=classes
    )
    return new_model(config.model_copy(update=changes), seed=1)


# The sampler


@pytest.mark.parametrize(("identities", "p"), [(7, 3), (6, 3), (16, 16), (17, 16), (5, 16), (2, 1)])
def test_an_epoch_is_p_x_k_batches_that_visit_every_identity(identities, p):
    classes = np.repeat(np.arange(identities), 5)
    sampler = IdentitySampler(classes, p, 4)
    batches = list(sampler.epoch(np.random.default_rng(0)))
    p = min(p, identities)
    assert len(batches) == len(sampler) == math.ceil(identities / p)
    for batch in batches:
        chosen, counts = np.unique(classes[batch], return_counts=True)
        assert (len(chosen), set(counts)) == (p, {4})
        assert len(np.unique(batch)) == len(batch)  # five images each: none need come twice
    assert set(classes[np.concatenate(batches)]) == set(range(identities))


def test_an_identity_with_fewer_images_gives_all_of_them_and_some_again():
    classes = np.array([0, 0, 0, 0, 1, 1, 2])
    batch = next(IdentitySampler(classes, 3, 4).epoch(np.random.default_rng(0)))
    for identity, members in ((0, {0, 1, 2, 3}), (1, {4, 5}), (2, {6})):
        own = [index for index in batch if classes[index] == identity]
        assert (len(own), set(own)) == (4, members)


def test_batches_are_the_generators():
    classes = np.repeat(np.arange(9), 6)
    sampler = IdentitySampler(classes, 4, 4)
    first, again, other = (list(sampler.epoch(np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_epochs_differ():
    sampler, rng = IdentitySampler(np.repeat(np.arange(9), 6), 4, 4), np.random.default_rng(1)
    assert not np.array_equal(list(sampler.epoch(rng)), list(sampler.epoch(rng)))


def test_every_image_comes_at_last():
    sampler, rng = IdentitySampler(np.repeat(np.arange(4), 9), 4, 4), np.random.default_rng(0)
    assert {int(index) for _ in range(40) for batch in sampler.epoch(rng) for index in batch} == set(range(36))


# The images


def test_classes_number_the_identities_in_order(people, crops):
    identities = sorted({image.identity for image in people.train})
    assert crops.num_classes == len(identities) == 5
    assert [identities[number] for number in crops.classes] == [image.identity for image in people.train]


def test_marked_images_are_mirrored_and_the_set_is_not_changed(crops):
    before = crops.crops.copy()
    pixels, classes = crops.batch(np.array([3, 4]), np.array([True, False]))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels[0].numpy(), before[3][:, ::-1])
    assert np.array_equal(pixels[1].numpy(), before[4])
    assert classes.tolist() == crops.classes[[3, 4]].tolist()
    assert np.array_equal(crops.crops, before)


def test_one_identity_cannot_be_trained_on(people):
    alone = [image for image in people.train if image.identity == people.train[0].identity]
    with pytest.raises(UserError, match="at least two identities; these have 1"):
        TrainingSet(alone, HEIGHT, WIDTH)


def test_a_broken_training_image_is_named(people, tmp_path):
    (tmp_path / "0009_c1s1_000001_00.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0009_c1s1_000001_00\.jpg' cannot be trained on: not an image"):
        TrainingSet([*people.train, LabelledImage(tmp_path / "0009_c1s1_000001_00.jpg", 9, 1)], HEIGHT, WIDTH)


def test_progress_ends_at_the_number_of_images(people):
    seen = []
    TrainingSet(people.train, HEIGHT, WIDTH, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(people.train)) for done in range(1, len(people.train) + 1)]


# The loop


def trained(crops: TrainingSet, schedule: Schedule) -> tuple[dict[str, torch.Tensor], list[Step]]:
    model, steps = untrained(crops.num_classes), []
    fit(model, crops, schedule, steps.append)
    assert not model.training
    return model.state_dict(), steps


def test_the_loss_falls_and_one_seed_gives_one_model(crops):
    schedule = Schedule(epochs=25, learning_rate=2e-3, seed=3)
    first, steps = trained(crops, schedule)
    again, _ = trained(crops, schedule)
    assert len(steps) == 25
    losses = [step.loss for step in steps]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_gives_another_model(crops):
    first, _ = trained(crops, Schedule(epochs=2, seed=3))
    other, _ = trained(crops, Schedule(epochs=2, seed=4))
    assert not torch.equal(first["trunk.0.weight"], other["trunk.0.weight"])


def test_steps_tell_epochs_and_the_share_that_is_done(crops):
    _, steps = trained(crops, Schedule(epochs=3, identities_per_batch=2, images_per_identity=2))
    assert [(step.epoch, step.last_of_epoch) for step in steps] == [
        (epoch, last) for epoch in range(3) for last in (False, False, True)
    ]
    assert [step.done for step in steps] == pytest.approx([place / 9 for place in range(9)])
    for step in steps:
        assert step.loss == pytest.approx(step.softmax + step.triplet, rel=1e-5)


def test_the_time_limit_ends_the_training(crops):
    start = time.monotonic()
    _, steps = trained(crops, Schedule(epochs=10**6, seconds=1.0))
    assert 1 <= len(steps) < 10**5
    assert time.monotonic() - start < 10


def test_a_loss_that_is_not_finite_names_the_step(crops):
    model = untrained(crops.num_classes)
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) at step [1-9]\d* \(epoch \d+\): lower the learning rate"
    ):
        fit(model, crops, Schedule(epochs=50, learning_rate=1e30))
    assert not model.training


def test_another_number_of_classes_is_a_sentence(crops):
    with pytest.raises(UserError, match="the model has 7 classes and the data 5 identities"):
        fit(untrained(7), crops, Schedule(epochs=1))


# Accuracy from PyTorch


def test_evaluating_is_embedding_and_ranking(people, weights, bundle_folder):
    model = load_weights(weights).train()
    metrics = evaluate_model(model, people, batch_size=5)
    assert model.training
    embedder = Embedder.open(bundle_folder, "torch")
    expected = evaluate_embeddings(
        embedder.embed([np.asarray(Image.open(image.path)) for image in people.query]),
        embedder.embed([np.asarray(Image.open(image.path)) for image in people.gallery]),
        [image.identity for image in people.query],
        [image.camera for image in people.query],
        [image.identity for image in people.gallery],
        [image.camera for image in people.gallery],
    )
    assert metrics.to_dict() == pytest.approx(expected.to_dict(), abs=1e-6)
