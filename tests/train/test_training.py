"""The loop: its images, its rows, its options, and the command that runs it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import mgn_deploy
from plain_loop import HEIGHT, LOOP, WIDTH, assert_trained_alike, plain_loop
from small_runs import ONE_THREAD, TINY, command, draw_people, rows, run, same, tensors

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.errors import UserError
from mgn_deploy.images.decode import read_crop
from mgn_deploy.train.data import TrainingSet
from mgn_deploy.train.evaluate import evaluate_model
from mgn_deploy.train.recipe import Augment, load_recipe
from mgn_deploy.train.run import BEST, WEIGHTS, Step
from mgn_deploy.train.trainer import train
from mgn_deploy.train.weights import load_weights, new_model


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Dataset:
    return draw_people(tmp_path_factory.mktemp("drawn") / "people")


class Run(NamedTuple):
    out: Path
    steps: list[Step]


@pytest.fixture(scope="module")
def one_epoch(people, tmp_path_factory) -> Run:
    """A run of one epoch. Tests that change it copy it first."""
    out = tmp_path_factory.mktemp("one") / "run"
    return Run(out, run(people, out, "schedule.epochs=1"))


# The images


def test_classes_number_the_identities_in_order(people):
    training = TrainingSet(people.train, HEIGHT, WIDTH, (0.5, 0.5, 0.5))
    identities = sorted({image.identity for image in people.train})
    assert len(identities) == 5
    assert [identities[number] for number in training.classes] == [image.identity for image in people.train]


def test_batches_hold_the_chosen_images_and_are_a_function_of_their_number(people):
    training = TrainingSet(people.train, HEIGHT, WIDTH, (0.5, 0.5, 0.5))
    chosen = [np.array([0, 3]), np.array([2, 7]), np.array([1, 4])]
    plain = list(training.batches(chosen, Augment(flip=0), (0, 0)))
    for indices, (crops, classes) in zip(chosen, plain, strict=True):
        assert (crops.dtype, tuple(crops.shape)) == (torch.uint8, (2, HEIGHT, WIDTH, 3))
        assert classes.tolist() == training.classes[indices].tolist()
        assert np.array_equal(crops[0].numpy(), read_crop(people.train[indices[0]].path, HEIGHT, WIDTH))
    strong = Augment(erase=1, pad=5)
    whole = list(training.batches(chosen, strong, (0, 0)))
    resumed = list(training.batches(chosen, strong, (0, 0), first=1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], resumed, strict=True))
    other = list(training.batches(chosen, strong, (0, 1)))
    assert not torch.equal(whole[0][0], other[0][0])


def test_one_identity_cannot_be_trained_on(people, tmp_path):
    alone = [image for image in people.train if image.identity == people.train[0].identity]
    with pytest.raises(UserError, match="at least two identities; these have 1"):
        run(Dataset("folder", people.root, alone, [], []), tmp_path)


def test_a_broken_training_image_is_named(people, tmp_path):
    (tmp_path / "0009_c1s1_000001_00.jpg").write_bytes(b"no image")
    broken = [LabelledImage(tmp_path / "0009_c1s1_000001_00.jpg", 9, 1)]
    with pytest.raises(UserError, match=r"^1 of the 41 images of .*0009_c1s1_000001_00\.jpg \(not an image"):
        run(Dataset("folder", people.root, people.train + broken, [], []), tmp_path / "run", "schedule.epochs=1")


def test_a_broken_query_image_is_named(people, weights, tmp_path):
    (tmp_path / "0009_c1s1_000001_00.jpg").write_bytes(b"no image")
    broken = LabelledImage(tmp_path / "0009_c1s1_000001_00.jpg", 9, 1)
    with pytest.raises(UserError, match=r"0009_c1s1_000001_00\.jpg' cannot be used: not an image"):
        evaluate_model(load_weights(weights), dataclasses.replace(people, query=[broken]))


# The loop


def test_the_loss_falls(people, tmp_path):
    steps = run(people, tmp_path, "schedule.epochs=15", "batch.identities=5", "batch.images=4")
    assert len(steps) == 15
    losses = [step.loss for step in steps]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5]), losses


def test_one_seed_gives_one_model(people, one_epoch, tmp_path):
    run(people, tmp_path / "again", "schedule.epochs=1")
    assert same(tensors(one_epoch.out), tensors(tmp_path / "again"))
    run(people, tmp_path / "other", "schedule.epochs=1", "loop.seed=1")
    assert not same(tensors(one_epoch.out), tensors(tmp_path / "other"))


def test_every_epoch_has_its_row_and_its_evaluation(people, tmp_path):
    steps = run(people, tmp_path, "schedule.epochs=5", "loop.evaluate_every=2")
    assert [(step.epoch, step.batch, step.batches) for step in steps] == [
        (epoch, batch, 3) for epoch in range(1, 6) for batch in (1, 2, 3)
    ]
    table = rows(tmp_path)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4", "5"]
    assert [bool(row["mAP"]) for row in table] == [False, True, False, True, True]  # the last one always
    for number, row in enumerate(table):
        own = [step.loss for step in steps[3 * number : 3 * number + 3]]
        assert float(row["loss"]) == pytest.approx(np.mean(own))
        assert float(row["loss"]) == pytest.approx(float(row["softmax"]) + float(row["triplet"]), rel=1e-5)
    metrics = evaluate_model(load_weights(tmp_path / WEIGHTS), people)
    assert float(table[-1]["mAP"]) == pytest.approx(metrics.mAP, abs=1e-6)
    best = max(float(row["mAP"]) for row in table if row["mAP"])
    assert evaluate_model(load_weights(tmp_path / BEST), people).mAP == pytest.approx(best, abs=1e-6)
    assert list((tmp_path / "tensorboard").iterdir())


def test_accumulation_steps_once_for_several_batches(people, tmp_path):
    run(people, tmp_path / "once", "schedule.epochs=1", "batch.accumulate=3", "optim.name=sgd", "optim.lr=1e-3")
    run(people, tmp_path / "thrice", "schedule.epochs=1", "optim.name=sgd", "optim.lr=1e-3")
    before = new_model(load_recipe("small", TINY).model.config(5)).state_dict()
    name = "trunk.0.weight"
    one, three = ((tensors(tmp_path / out)[name] - before[name]).norm().item() for out in ("once", "thrice"))
    assert 0 < one < 0.7 * three  # a mean of three gradients against their sum


def test_the_time_limit_ends_the_training(people, tmp_path):
    start = time.monotonic()
    steps = run(people, tmp_path, "schedule.epochs=100000", "schedule.max_seconds=3", "loop.evaluate_every=100000")
    assert 1 <= len(steps) < 10**4
    assert time.monotonic() - start < 20
    assert float(rows(tmp_path)[-1]["lr"]) < 0.9 * 2e-3, "the schedule is squeezed into the limit"
    assert load_weights(tmp_path / WEIGHTS).config.num_classes == 5


def test_a_loss_that_is_not_finite_names_the_step(people, tmp_path):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch \d+, batch \d: lower optim.lr \(1e\+30\)"):
        run(people, tmp_path, "optim.lr=1e30", "schedule.epochs=50")


@pytest.mark.parametrize("setting", ["loop.amp=bf16", "loss.soft_margin=true", "loss.label_smoothing=0.1"])
def test_options_train(people, one_epoch, tmp_path, setting):
    plain = one_epoch.steps
    steps = run(people, tmp_path / "option", "schedule.epochs=1", setting)
    assert np.isfinite([step.loss for step in steps]).all()
    assert steps[0].loss != plain[0].loss
    assert steps[0].loss == pytest.approx(plain[0].loss, rel=0.5)


def test_a_run_starts_from_the_weights_of_another(people, one_epoch, tmp_path):
    init = f"model.init={one_epoch.out / WEIGHTS}"
    run(people, tmp_path, "schedule.epochs=1", "optim.lr=1e-30", "optim.weight_decay=0.0", init)
    before, after = tensors(one_epoch.out), tensors(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".weight"))


def test_a_run_starts_from_weights_for_another_size_and_other_people(people, one_epoch, tmp_path):
    fewer = Dataset("folder", people.root, [image for image in people.train if image.identity <= 3], [], [])
    init = f"model.init={one_epoch.out / WEIGHTS}"
    steps = run(fewer, tmp_path, "schedule.epochs=1", init, "model.height=144", "model.width=48")
    config = load_weights(tmp_path / WEIGHTS).config
    assert (config.height, config.width, config.num_classes) == (144, 48, 3)
    assert np.isfinite([step.loss for step in steps]).all()


# The command


@pytest.mark.slow
def test_torchrun_trains_one_model_on_two_processes(people, tmp_path):
    settings = (*LOOP, "batch.identities=3")
    arguments = command(people, tmp_path / "run", *settings)[1:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run" / WEIGHTS)], "rank 0 alone prints"
    for sentence in ("training images", "epoch   1/2", "epoch   2/2", "rank-1"):
        assert done.stderr.count(sentence) == 1, "rank 0 alone logs"
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["1", "2"]
    assert_trained_alike(tmp_path / "run", plain_loop(people, load_recipe("small", [*TINY, *settings]), ranks=2))


def test_the_command_prints_the_weights_folder(people, tmp_path):
    overrides = [word for setting in (*TINY, "schedule.epochs=1") for word in ("--set", setting)]
    data = f"market1501:{people.root}"
    done = mgn_deploy("train", "--data", data, "-o", tmp_path / "run", "--recipe", "small", *overrides)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / WEIGHTS}\n"
    assert "epoch   1/1  loss" in done.stderr
    assert "the published market1501 has 12,936 images of 751 identities" in done.stderr
    assert "rank-1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--recipe", "papre"), "no recipe 'papre'"),
        (("--set", "optim.lrr=1"), "did you mean 'optim.lr'"),
        (("--set", "model.init=missing.pth"), "missing.pth"),
        (("--set", "model.backbone=vgg16"), "vgg16"),
    ],
)
def test_bad_arguments_are_one_sentence(people, tmp_path, arguments, sentence):
    data = f"market1501:{people.root}"
    done = mgn_deploy("train", "--data", data, "-o", tmp_path / "run", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_library_refuses_a_device_that_cannot_be(people, tmp_path):
    with pytest.raises(UserError, match="--device tpu: choose auto, cpu, cuda"):
        train(people, load_recipe("small", TINY), tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()
