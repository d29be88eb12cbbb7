"""`train --init`: what training starts from, what of it is kept, and what cannot be started from."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import mgn_deploy
from small_runs import TINY, draw_people, tensors

from mgn_deploy.datasets import Dataset
from mgn_deploy.train.recipe import load_recipe
from mgn_deploy.train.run import WEIGHTS
from mgn_deploy.train.weights import load_weights, write_untrained_weights

STILL = ("optim.name=sgd", "optim.lr=1e-30", "optim.weight_decay=0.0", "schedule.epochs=1")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Dataset:
    return draw_people(tmp_path_factory.mktemp("drawn") / "people")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of 9 people, which are not those of the data."""
    folder = tmp_path_factory.mktemp("weights") / "w"
    write_untrained_weights(folder, load_recipe("small", TINY).model.config(num_classes=9), "random", seed=7)
    return folder


def train(people: Dataset, out: Path, *options: object, settings: tuple[str, ...] = STILL):
    overrides = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    data = ("--data", f"folder:{people.root}", "--no-evaluate", "--device", "cpu")
    return mgn_deploy("train", *data, "-o", out, "--recipe", "small", *overrides, *options)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_training_starts_from_weights_whose_heads_are_dropped_where_people_are_others(people, weights, tmp_path, what):
    start = weights if what == "folder" else weights / "mgn.safetensors"
    done = train(people, tmp_path / "run", "--init", start)
    assert done.exit_code == 0, done.stderr
    assert "its classifiers of 9 people are dropped, new ones for 5 people take their place" in done.stderr
    before, after = tensors(weights.parent, "w"), tensors(tmp_path / "run")
    kept = [name for name in before if name.endswith(".weight") and not name.startswith("classifiers.")]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert load_weights(tmp_path / "run" / WEIGHTS).config.num_classes == 5


def test_keys_of_the_recipe_that_the_weights_decide_are_said(people, weights, tmp_path):
    done = train(people, tmp_path / "run", "--init", weights, settings=(*STILL, "model.backbone=resnet34"))
    assert done.exit_code == 0, done.stderr
    assert f"model.backbone is resnet18: as in {weights}, not as in the recipe" in done.stderr


def test_it_goes_before_the_recipes_init_and_a_run_knows_it(people, weights, tmp_path):
    assert train(people, tmp_path / "run", "--init", weights, "--set", "model.init=nowhere").exit_code == 0
    done = train(people, tmp_path / "run", "--init", "random")
    assert done.exit_code == 2
    assert f"model.init was {str(weights)!r} and is 'random'" in done.stderr


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ("nowhere.pth", "--init nowhere.pth: no such file; it takes random, imagenet, or"),
        ("{run}", "is not a weights folder: it needs config.json and mgn.safetensors, .*; {run}/w is one"),
        ("{run}/notes.txt", "notes.txt is text, 'hello'"),
        ("{run}/w/config.json", "config.json is text"),
    ],
)
def test_what_cannot_be_started_from_is_one_sentence(people, weights, tmp_path, start, sentence):
    folder = weights.parent
    (folder / "notes.txt").write_text("hello")
    done = train(people, tmp_path / "run", "--init", start.format(run=folder))
    assert done.exit_code == 2
    assert re.search(sentence.format(run=folder), done.stderr.splitlines()[-1])
    assert not (tmp_path / "run/last.pt").exists()


def test_messages_name_options_that_the_commands_have():
    """Of every sentence in train/: `--option` is one of a command that says it."""
    import typer

    from mgn_deploy.cli.app import app

    commands = typer.main.get_command(app).commands
    own = [
        commands["figures"].commands["attention"],
        *(commands[name] for name in ("train", "init", "import", "export")),
    ]
    options = {one for command in own for given in command.params for one in (*given.opts, *given.secondary_opts)}
    other_tools = {"--model"}  # levyfan's own trainer has it
    named: dict[str, set[str]] = {}
    for path in sorted((Path(__file__).parents[2] / "train").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for option in re.findall(r"--[a-z][a-z-]*", node.value):
                    named.setdefault(option, set()).add(path.name)
    assert {option: where for option, where in named.items() if option not in options | other_tools} == {}
    assert {"--allow-data-change", "--no-evaluate", "--init", "--pool"} <= named.keys()
