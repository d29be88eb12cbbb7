"""Training against a plain loop, and its evaluation against embedding and ranking."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from plain_loop import HEIGHT, LOOP, WIDTH, assert_trained_alike, plain_loop
from small_runs import ONE_THREAD, TINY, draw_people, run, tensors

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.images.decode import read_crop
from mgn_deploy.retrieval.evaluation import score_embeddings
from mgn_deploy.retrieval.truth import Truth
from mgn_deploy.train.data import TrainingSet
from mgn_deploy.train.evaluate import evaluate_model
from mgn_deploy.train.model import Embedding
from mgn_deploy.train.recipe import Augment, load_recipe
from mgn_deploy.train.run import WEIGHTS
from mgn_deploy.train.weights import load_weights, new_model


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Dataset:
    return draw_people(tmp_path_factory.mktemp("drawn") / "people")


# Accuracy from PyTorch


def test_evaluating_is_embedding_and_ranking(people, weights, monkeypatch):
    monkeypatch.setattr("mgn_deploy.train.evaluate.BATCH", 5)
    model = load_weights(weights).train()
    metrics = evaluate_model(model, people)
    assert model.training
    embedding = Embedding(load_weights(weights))

    def embed(images: list[LabelledImage]) -> np.ndarray:
        crops = np.stack([read_crop(image.path, model.config.height, model.config.width) for image in images])
        with torch.inference_mode():
            return embedding(torch.from_numpy(crops)).numpy()

    expected = score_embeddings(embed(people.query), embed(people.gallery), Truth.of_dataset(people)).metrics
    assert metrics.to_dict() == pytest.approx(expected.to_dict(), abs=1e-6)


# Against a plain loop


def test_training_is_a_plain_loop(people, tmp_path):
    settings = [*TINY, *LOOP, "batch.accumulate=2"]  # of 3 batches: the second step is of one
    run(people, tmp_path, *settings)
    assert_trained_alike(tmp_path, plain_loop(people, load_recipe("small", settings)))


def test_batches_of_an_epoch_are_augmented_differently(people):
    training = TrainingSet(people.train, HEIGHT, WIDTH, (0.5, 0.5, 0.5))
    (first, _), (second, _) = training.batches([np.array([0, 3])] * 2, Augment(erase=1, pad=5), (0, 0))
    assert not torch.equal(first, second)


def test_erased_pixels_are_the_networks_mean(people):
    training = TrainingSet(people.train, HEIGHT, WIDTH, (0.485, 0.456, 0.406))
    ((plain, _),) = training.batches([np.array([0, 3])], Augment(flip=0), (0, 0))
    ((erased, _),) = training.batches([np.array([0, 3])], Augment(flip=0, erase=1), (0, 0))
    assert {tuple(pixel) for pixel in erased[(erased != plain).any(-1)].tolist()} == {(124, 116, 104)}


def test_half_precision_scales_losses_and_not_steps(people, tmp_path):
    settings = ("schedule.epochs=4", "optim.name=sgd", "optim.lr=1e-4", "optim.momentum=0.0", "loop.amp=fp16")
    run(people, tmp_path, *settings)
    start = new_model(load_weights(tmp_path / WEIGHTS).config).state_dict()["trunk.0.weight"]
    moved = (tensors(tmp_path)["trunk.0.weight"] - start).norm().item()
    assert 1e-3 < moved < 0.1, "0.013 in float32"
    scaler = torch.load(tmp_path / "last.pt", weights_only=True)["scaler"]
    assert 1 < scaler["scale"] < 2**16, "the first steps overflow"


def test_ranks_agree_on_the_value_of_the_first():
    code = (
        "from mgn_deploy.train.distributed import Group\nwith Group('cpu') as group: print(group.agree(5 + group.rank))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**ONE_THREAD, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**environment, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=60)[0] for process in ranks] == ["5.0\n", "5.0\n"]
