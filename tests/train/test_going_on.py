"""A run that ended or was stopped goes on: with the same bits, for longer, or with the difference named."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_runs import ONE_THREAD, command, draw_people, rows, run, same, stop_in_step, tensors

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.errors import UserError
from mgn_deploy.images.check import ImageFacts
from mgn_deploy.train.log import RunLog
from mgn_deploy.train.run import BEST, WEIGHTS, Step
from mgn_deploy.train.started import image_differences
from mgn_deploy.train.weights import load_weights


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


@pytest.fixture
def copied(one_epoch, tmp_path) -> Path:
    """The folder of a run of one epoch, which a test may change."""
    return Path(shutil.copytree(one_epoch.out, tmp_path / "copy"))


@pytest.fixture
def own(tmp_path) -> Dataset:
    """The same people, whose files a test may change."""
    return draw_people(tmp_path / "own")


STOPPED = ("schedule.epochs=8", "augment.erase=0.5", "augment.pad=4", "optim.name=adam", "loop.evaluate_every=3")


@pytest.fixture(scope="module")
def whole(people, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(people, out, *STOPPED)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bits(people, whole, tmp_path, how, said):
    out = tmp_path / "run"
    pipe = subprocess.PIPE
    with subprocess.Popen(command(people, out, *STOPPED), stderr=pipe, stdout=pipe, env=ONE_THREAD) as process:
        deadline = time.monotonic() + 60
        while not (out / "epochs.csv").is_file() or len(rows(out)) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 128 + how)
    assert not (out / WEIGHTS).exists()
    run(people, out, *STOPPED)
    assert any("goes on after epoch" in sentence for sentence in said)
    assert same(tensors(whole), tensors(out))
    assert same(tensors(whole, BEST), tensors(out, BEST))
    keys = ("epoch", "lr", "loss", "softmax", "triplet", "rank-1", "mAP")
    assert [[row[key] for key in keys] for row in rows(out)] == [[row[key] for key in keys] for row in rows(whole)]


def test_a_damaged_state_is_named(people, copied):
    state = copied / "last.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    with pytest.raises(UserError, match=r"last\.pt is damaged.*delete it to start the run again"):
        run(people, copied, "schedule.epochs=1")


def test_a_run_stopped_within_an_accumulation_and_an_epoch_ends_with_the_same_bits(people, tmp_path):
    settings = ("schedule.epochs=1", "batch.accumulate=2")
    run(people, tmp_path / "whole", *settings)
    stop_in_step(1, people, tmp_path / "stopped", *settings)
    run(people, tmp_path / "stopped", *settings)
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "stopped"))
    keys = ("epoch", "lr", "loss", "softmax", "triplet", "mAP")
    whole, stopped = ([[row[key] for key in keys] for row in rows(tmp_path / out)] for out in ("whole", "stopped"))
    assert whole == stopped


def test_the_time_limit_counts_what_earlier_starts_took(people, tmp_path):
    settings = ("schedule.epochs=3", "schedule.max_seconds=1000")
    stop_in_step(1, people, tmp_path, *settings)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["position"]["seconds"] = 1000.0
    torch.save(state, tmp_path / "last.pt")
    assert run(people, tmp_path, *settings) == []


# For longer


def test_more_epochs_are_added_to_a_run_that_has_ended(people, tmp_path, said):
    steady = ("schedule.kind=steps", "optim.lr=1e-3")
    run(people, tmp_path / "whole", *steady, "schedule.epochs=3")
    run(people, tmp_path / "longer", *steady, "schedule.epochs=2")
    steps = run(people, tmp_path / "longer", *steady, "schedule.epochs=3")
    assert [step.epoch for step in steps] == [3, 3, 3]
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "longer"))
    assert [row["epoch"] for row in rows(tmp_path / "longer")] == ["1", "2", "3"]
    assert "schedule.epochs is 3 from here on; it was 2" in said


def test_a_cosine_that_goes_on_is_that_of_the_new_length(people, copied):
    run(people, copied, "schedule.epochs=4")
    assert [float(row["lr"]) for row in rows(copied)[1:]] == pytest.approx(
        [2e-3 * 0.5 * (1 + np.cos(np.pi * (3 * epoch + 2) / 12)) for epoch in (1, 2, 3)]
    )


def test_a_run_that_is_done_trains_nothing_and_says_how_to_go_on(people, copied, said):
    before = tensors(copied)
    shutil.rmtree(copied / WEIGHTS)
    assert run(people, copied, "schedule.epochs=1") == []
    assert same(before, tensors(copied))
    assert "all 1 epochs are done: more are trained with a larger schedule.epochs" in said


def test_a_run_goes_on_where_what_it_started_from_is_gone(people, one_epoch, tmp_path):
    start = shutil.copytree(one_epoch.out / WEIGHTS, tmp_path / "start")
    settings = (f"model.init={start}", "schedule.epochs=2")
    stop_in_step(2, people, tmp_path / "run", *settings)
    shutil.rmtree(start)
    run(people, tmp_path / "run", *settings)
    assert load_weights(tmp_path / "run" / WEIGHTS).config == load_weights(one_epoch.out / WEIGHTS).config


# With something else


def test_another_recipe_is_refused_by_its_keys(people, one_epoch, said):
    with pytest.raises(UserError) as refused:
        run(people, one_epoch.out, "schedule.epochs=2", "optim.lr=0.01", "model.branches=[1, 2]")
    for words in ("optim.lr was 0.002 and is 0.01", "model.branches was [1, 2, 3] and is [1, 2]", "--init"):
        assert words in str(refused.value)
    assert "schedule.epochs was" not in str(refused.value)
    assert not any("from here on" in sentence for sentence in said)


def test_another_number_of_processes_is_refused(people, copied):
    state = torch.load(copied / "last.pt", weights_only=True)
    state["started"] = state["started"].replace('"ranks": 1', '"ranks": 4')
    torch.save(state, copied / "last.pt")
    with pytest.raises(UserError, match="holds a run of 4 processes, and this has 1"):
        run(people, copied, "schedule.epochs=1")


def test_other_images_are_refused_by_their_names(own, tmp_path):
    run(own, tmp_path / "run", "schedule.epochs=1")
    first, second, third, *rest = own.train
    third.path.write_bytes(second.path.read_bytes())
    renamed = third.path.with_name("0004_c1s1_999999_00.jpg")
    shutil.copy(third.path, renamed)
    relabelled = dataclasses.replace(second, identity=5)
    changed = dataclasses.replace(own, train=[relabelled, third, *rest, LabelledImage(renamed, 4, 1)])
    with pytest.raises(UserError) as refused:
        run(changed, tmp_path / "run", "schedule.epochs=1")
    folder = "bounding_box_train/"
    assert (
        f"(1 removed: {folder}{first.path.name}; 1 added: {folder}{renamed.name}; "
        f"1 of another identity: {folder}{second.path.name}; 1 changed: {folder}{third.path.name})"
    ) in str(refused.value)
    assert "--allow-data-change" in str(refused.value)


def test_data_that_moved_are_the_same_data(own, tmp_path):
    run(own, tmp_path / "run", "schedule.epochs=1")
    moved = open_market1501(own.root.rename(tmp_path / "elsewhere"))
    assert run(moved, tmp_path / "run", "schedule.epochs=1") == []


def test_many_differences_are_counted_and_the_first_are_named():
    images = {f"{number:02d}.jpg": [1, 1, 10, number] for number in range(40)}
    assert image_differences(images, {}) == "40 removed: 00.jpg, 01.jpg, 02.jpg, 03.jpg, 04.jpg and 35 more"
    assert image_differences(images, images) == ""


def test_a_broken_image_that_was_deleted_is_gone_on_without(own, tmp_path, said):
    settings = ("schedule.epochs=2",)
    stop_in_step(4, own, tmp_path / "run", *settings)
    own.train[0].path.unlink()
    fewer = open_market1501(own.root)
    steps = run(fewer, tmp_path / "run", *settings, allow_data_change=True)
    assert [(step.epoch, step.batch) for step in steps] == [(2, 2), (2, 3)]
    assert any("goes on with other training images (1 removed: " in sentence for sentence in said)
    assert run(fewer, tmp_path / "run", *settings) == [], "from there on it is the run's own data"


def test_an_image_that_breaks_on_the_way_is_named_with_the_way_on(own, tmp_path, monkeypatch):
    own.train[0].path.write_bytes(b"")
    monkeypatch.setattr("mgn_deploy.train.prepare.check_image", lambda path: ImageFacts(1, 1))
    with pytest.raises(UserError, match=r"\.jpg' cannot be used: the file is empty; .* go on with --allow-data-change"):
        run(own, tmp_path / "run", "schedule.epochs=100")
    monkeypatch.undo()
    own.train[0].path.unlink()
    fewer = open_market1501(own.root)
    assert run(fewer, tmp_path / "run", "schedule.epochs=2", allow_data_change=True)


def test_a_run_goes_on_with_other_people(own, tmp_path):
    run(own, tmp_path / "run", "schedule.epochs=1")
    for image in own.train:
        if image.identity == 2:
            image.path.unlink()
    steps = run(open_market1501(own.root), tmp_path / "run", "schedule.epochs=2", allow_data_change=True)
    assert len(steps) == 2
    assert np.isfinite([step.loss for step in steps]).all()
    assert load_weights(tmp_path / "run" / WEIGHTS).config.num_classes == 4


# The log


@pytest.mark.parametrize("step", [1, 4])
def test_rows_survive_a_second_stop(people, copied, step):
    stop_in_step(step, people, copied, "schedule.epochs=3")
    assert [row["epoch"] for row in rows(copied)] == ["1", "2"][: 1 + step // 4]


def test_rows_of_epochs_that_are_run_again_are_dropped(tmp_path):
    log = RunLog(tmp_path, 0)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "loss": 1 / epoch})
    log.close()
    before = (tmp_path / "epochs.csv").read_bytes()
    log = RunLog(tmp_path, 1)
    assert (tmp_path / "epochs.csv").read_bytes() == before, "until there is a row to write"
    log.write({"epoch": 2, "loss": 0.25})
    log.close()
    assert [(row["epoch"], row["loss"]) for row in rows(tmp_path)] == [("1", "1.0"), ("2", "0.25")]


def test_a_run_in_a_folder_whose_name_is_no_utf8_is_logged_without_tensorboard(tmp_path, caplog):
    folder = tmp_path / "M\udce4rz"
    folder.mkdir()
    log = RunLog(folder, 0)
    log.write({"epoch": 1, "loss": 0.5})
    log.close()
    assert [row["loss"] for row in rows(folder)] == ["0.5"]
    assert "no TensorBoard files" in caplog.text


def test_a_log_that_was_edited_is_read_as_far_as_it_can_be(tmp_path):
    (tmp_path / "epochs.csv").write_bytes(b"epoch,loss,mine\n1,0.5,x\n,,\n\xff,1\n")
    log = RunLog(tmp_path, 3)
    log.write({"epoch": 4, "loss": 0.1})
    log.close()
    assert [(row["epoch"], row["loss"]) for row in rows(tmp_path)] == [("1", "0.5"), ("4", "0.1")]


@pytest.mark.parametrize("moment", ["mgn_deploy.train.run.save_weights", "mgn_deploy.train.trainer.evaluate_model"])
def test_a_run_killed_before_its_log_ends_all_the_same(people, one_epoch, tmp_path, monkeypatch, moment):
    out = tmp_path / "run"
    monkeypatch.setattr(moment, killed)
    with pytest.raises(KeyboardInterrupt):
        run(people, out, "schedule.epochs=1")
    monkeypatch.undo()
    assert not (out / "epochs.csv").exists()
    assert (out / WEIGHTS).exists() == moment.endswith("evaluate_model"), "weights come before the evaluation"
    assert run(people, out, "schedule.epochs=1") == []
    assert same(tensors(one_epoch.out), tensors(out))
    assert same(tensors(one_epoch.out, BEST), tensors(out, BEST))
    keys = ("epoch", "lr", "loss", "rank-1", "mAP")
    assert [rows(out)[0][key] for key in keys] == [rows(one_epoch.out)[0][key] for key in keys]


def killed(*arguments, **options):
    raise KeyboardInterrupt
