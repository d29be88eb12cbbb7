"""Training as a plain loop, and how near a run has to come to it."""

from __future__ import annotations

from pathlib import Path

import torch
from small_runs import tensors

from mgn_deploy.datasets import Dataset
from mgn_deploy.train.data import TrainingSet
from mgn_deploy.train.losses import mgn_loss
from mgn_deploy.train.model import Embedding
from mgn_deploy.train.recipe import Recipe
from mgn_deploy.train.run import WEIGHTS
from mgn_deploy.train.sampler import IdentitySampler
from mgn_deploy.train.weights import load_weights, new_model

HEIGHT, WIDTH = 96, 32


def plain_loop(people: Dataset, recipe: Recipe, ranks: int = 1) -> dict[str, torch.Tensor]:
    """The parameters after SGD with the mean of the ranks' and of the accumulated batches' gradients."""
    model = new_model(recipe.model.config(5)).train()
    normalise = Embedding(new_model(recipe.model.config(5)), flip=False).normalise
    data, batch, optim = TrainingSet(people.train, HEIGHT, WIDTH, model.config.mean), recipe.batch, recipe.optim
    sgd = torch.optim.SGD(model.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay)
    samplers = [
        IdentitySampler(data.classes, batch.identities, batch.images, rank=r, ranks=ranks) for r in range(ranks)
    ]
    for epoch in range(recipe.schedule.epochs):
        loaded = [
            list(data.batches(sampler.epoch(epoch), recipe.augment, (0, epoch, rank)))
            for rank, sampler in enumerate(samplers)
        ]
        for number, step in enumerate(zip(*loaded, strict=True), start=1):
            for crops, classes in step:
                loss, _ = mgn_loss(model(normalise(crops)), classes, recipe.loss)
                (loss / ranks / batch.accumulate).backward()
            if number % batch.accumulate == 0 or number == len(loaded[0]):
                share = (epoch + (number - 1) / len(loaded[0])) / recipe.schedule.epochs
                sgd.param_groups[0]["lr"] = optim.lr * recipe.schedule.rate_factor(share)
                sgd.step()
                sgd.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


LOOP = (
    "optim.name=sgd",
    "optim.lr=1e-4",  # so small that rounding decides no hinge
    "optim.weight_decay=0.1",
    "schedule.epochs=2",
    "batch.images=3",
    "augment.erase=0.5",
    "augment.pad=4",
)


def assert_trained_alike(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Apart by no more than a hundredth of how far training moved."""
    found, start = tensors(out), new_model(load_weights(out / WEIGHTS).config).state_dict()
    for name, parameter in expected.items():
        assert (found[name] - parameter).norm() <= 0.01 * (parameter - start[name]).norm() + 1e-6, name
