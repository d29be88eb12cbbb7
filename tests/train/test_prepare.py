"""Before the first step: nobody's images go, broken files are named, an evaluation that cannot be is done without."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import mgn_deploy
from small_runs import ONE_THREAD, TINY, draw_people, rows, run

from mgn_deploy.datasets import Dataset, LabelledImage
from mgn_deploy.datasets.dataset import NO_CAMERA
from mgn_deploy.datasets.market1501 import open_market1501
from mgn_deploy.errors import UserError
from mgn_deploy.train.checkpoint import load_checkpoint
from mgn_deploy.train.prepare import open_training_data, prepare
from mgn_deploy.train.recipe import Batch
from mgn_deploy.train.run import WEIGHTS
from mgn_deploy.train.weights import load_weights

BATCH = Batch(identities=2, images=2)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Dataset:
    return draw_people(tmp_path_factory.mktemp("drawn") / "people")


@pytest.fixture
def own(people, tmp_path) -> Dataset:
    """The same people, whose files a test may change."""
    return open_market1501(shutil.copytree(people.root, tmp_path / "own"))


def copied_as(image: LabelledImage, name: str) -> Path:
    return Path(shutil.copy(image.path, image.path.with_name(name)))


# Who is trained on


def test_junk_is_no_class_and_is_counted(own, tmp_path, said):
    copied_as(own.train[0], "-1_c1s1_000001_00.jpg")
    data = open_market1501(own.root)
    assert len(prepare(data, BATCH).people) == 5
    unsaid = dataclasses.replace(data, junk=frozenset())  # as of a caller who made the data set by hand
    run(unsaid, tmp_path / "run", "schedule.epochs=1")
    assert load_weights(tmp_path / "run" / WEIGHTS).config.num_classes == 5
    assert "1 training images of junk or distractors are not trained on" in said


@pytest.mark.parametrize(("kind", "classes"), [("folder", 6), ("market1501", 5)])
def test_identity_0_is_a_person_but_where_the_data_set_has_distractors(own, kind, classes):
    copied_as(own.train[0], "0000_c1s1_000001_00.jpg")
    prepared = prepare(open_training_data(f"{kind}:{own.root}"), BATCH)
    assert len({image.identity for image in prepared.data.train}) == classes


def test_one_person_cannot_be_trained_on(people):
    alone = [image for image in people.train if image.identity == people.train[0].identity]
    with pytest.raises(UserError, match="at least two identities; these have 1"):
        prepare(dataclasses.replace(people, train=alone), BATCH)


def test_too_few_people_and_images_for_a_batch_are_said(people, said):
    prepare(people, Batch(identities=16, images=9))
    assert "batches are of the 5 people that there are, not of 16" in said
    assert "5 of 5 people have fewer than 9 images: batches repeat some" in said
    said.clear()
    prepare(people, BATCH)
    assert len(said) == 1


# Broken files


def test_broken_files_of_all_subsets_are_counted_and_the_first_are_named(own):
    for image in [*own.train[:4], own.query[0], *own.gallery[:2]]:
        image.path.write_bytes(image.path.read_bytes()[:-300])
    own.train[0].path.write_bytes(b"")
    total = len(own.train) + len(own.query) + len(own.gallery)
    with pytest.raises(UserError) as refused:
        prepare(own, BATCH)
    names = [f"bounding_box_train/{image.path.name} (" for image in own.train[:4]]
    for words in (f"7 of the {total} images of {own.root}", *names, "the file is empty", "and 2 more", "--no-evaluate"):
        assert words in str(refused.value)


def test_query_and_gallery_are_not_read_without_an_evaluation(own):
    own.query[0].path.write_bytes(b"")
    prepared = prepare(own, BATCH, evaluate=False)
    assert (prepared.data.query, prepared.data.gallery, len(prepared.facts)) == ([], [], 40)


def test_progress_tells_of_every_file(people):
    told = []
    prepare(people, BATCH, progress=lambda *step: told.append(step))
    total = len(people.train) + len(people.query) + len(people.gallery)
    assert told == [("checking images", total, total)]


# The evaluation


def of_one_camera(images: list[LabelledImage]) -> list[LabelledImage]:
    return [dataclasses.replace(image, camera=1) for image in images]


def test_data_of_one_camera_train(people, tmp_path, said):
    single = dataclasses.replace(
        people,
        train=of_one_camera(people.train),
        query=of_one_camera(people.query),
        gallery=of_one_camera(people.gallery),
    )
    run(single, tmp_path, "schedule.epochs=1")
    assert load_weights(tmp_path / WEIGHTS).config.num_classes == 5
    assert rows(tmp_path)[0]["mAP"] == ""
    assert any("not evaluated: no query has an image of the same person by another camera" in line for line in said)


def test_queries_without_an_answer_are_counted(people, said):
    stranger = dataclasses.replace(people.query[0], identity=77)
    prepared = prepare(dataclasses.replace(people, query=[*people.query, stranger]), BATCH)
    assert len(prepared.data.query) == len(people.query) + 1
    assert any(line.startswith(f"1 of the {len(people.query) + 1} queries have no image of the same") for line in said)


def test_a_folder_a_person_trains_without_cameras_and_without_an_evaluation(people, tmp_path, said):
    for number, image in enumerate(people.train):
        folder = tmp_path / "own" / f"person {image.identity}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, folder / f"{number}.jpg")
    run(open_training_data(f"identities:{tmp_path / 'own'}"), tmp_path / "run", "schedule.epochs=1")
    assert "the run is not evaluated: there are no queries, or no gallery to find them in" in said
    assert load_checkpoint(tmp_path / "run").started.people == [f"person {number}" for number in range(1, 6)]


def test_without_cameras_every_other_image_of_a_person_is_an_answer(people):
    uncertain = {
        subset: [dataclasses.replace(image, camera=NO_CAMERA) for image in people.images(subset)]
        for subset in ("query", "gallery")
    }
    for has_cameras in (False, True):
        assert prepare(dataclasses.replace(people, **uncertain, has_cameras=has_cameras), BATCH).data.query


def test_an_evaluation_that_fails_is_a_warning(people, tmp_path, said, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("mgn_deploy.train.trainer.evaluate_model", fail)
    run(people, tmp_path, "schedule.epochs=2", "loop.evaluate_every=1")
    assert load_weights(tmp_path / WEIGHTS).config.num_classes == 5
    assert [row["mAP"] for row in rows(tmp_path)] == ["", ""]
    assert "epoch 2 is not evaluated: CUDA error: out of memory" in said


def command(own: Dataset, out: Path, *options: str):
    settings = [word for setting in (*TINY, "schedule.epochs=1") for word in ("--set", setting)]
    return mgn_deploy("train", "--data", f"folder:{own.root}", "-o", out, "--recipe", "small", *settings, *options)


@pytest.mark.parametrize("missing", ["query", "bounding_box_test"])
def test_the_command_trains_where_nothing_is_to_be_evaluated(own, tmp_path, missing):
    shutil.rmtree(own.root / missing)
    done = command(own, tmp_path / "run", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["weights"] == str(tmp_path / "run" / WEIGHTS)
    note = f"query and gallery are not read: {own.root} has no folder {missing!r}"
    assert f"warning: {note}" in done.stderr
    assert any(one.startswith(note) for one in json.loads(done.stdout)["notes"])


def test_the_command_does_not_look_for_query_and_gallery_with_no_evaluate(own, tmp_path):
    (own.root / "query/someone.jpg").write_bytes(b"")
    done = command(own, tmp_path / "run", "--no-evaluate")
    assert done.exit_code == 0, done.stderr
    assert "evaluated" not in done.stderr
    assert not (tmp_path / "run/best").exists()


@pytest.mark.slow
def test_only_the_first_process_opens_and_checks_the_data(own, tmp_path):
    program = f"""
import os
from pathlib import Path
from mgn_deploy.train.prepare import open_training_data
from mgn_deploy.train.recipe import load_recipe
from mgn_deploy.train.trainer import train

def opened():
    Path({str(tmp_path)!r}, "opened-" + os.environ["RANK"]).touch()
    return open_training_data("folder:{own.root}")

def told(step, done, total):
    Path({str(tmp_path)!r}, "told-" + os.environ["RANK"]).touch()

recipe = load_recipe("small", {[*TINY, "schedule.epochs=1"]!r})
train(opened, recipe, {str(tmp_path / "run")!r}, device="cpu", progress=told)
"""
    (tmp_path / "program.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["opened-0", "told-0"]
    assert load_weights(tmp_path / "run" / WEIGHTS).config.num_classes == 5
    own.train[0].path.write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=120)
    assert done.returncode
    assert "1 of the 68 images" in done.stderr
