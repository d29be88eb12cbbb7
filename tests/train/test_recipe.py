"""Recipes: the paper's numbers, overrides, and sentences for what cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mgn_deploy.errors import UserError
from mgn_deploy.train.recipe import Recipe, Schedule, load_recipe
from mgn_deploy.train.schedule import rate_factor


def test_the_papers_recipe_is_section_4_1():
    recipe = load_recipe("paper")
    assert (recipe.model.backbone, recipe.model.height, recipe.model.width) == ("resnet50", 384, 128)
    assert recipe.model.branches == (1, 2, 3)
    assert (recipe.batch.identities, recipe.batch.images) == (16, 4)
    assert (recipe.optim.name, recipe.optim.momentum, recipe.optim.weight_decay) == ("sgd", 0.9, 5e-4)
    assert recipe.loss.margin == 1.2
    assert not recipe.loss.soft_margin
    assert recipe.loss.label_smoothing == 0
    assert recipe.augment.model_dump() == {"flip": 0.5, "erase": 0, "pad": 0}


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-2), (39, 1e-2), (40, 1e-3), (59, 1e-3), (60, 1e-4), (79, 1e-4)])
def test_the_papers_learning_rates(epoch, rate):
    recipe = load_recipe("paper")
    assert recipe.schedule.epochs == 80
    assert recipe.optim.lr * rate_factor(recipe.schedule, epoch / 80) == pytest.approx(rate)


def test_strong_has_today_s_additions():
    recipe = load_recipe("strong")
    assert recipe.schedule.kind == "cosine"
    assert recipe.schedule.warm_up > 0
    assert recipe.loss.label_smoothing == 0.1
    assert recipe.augment.erase == 0.5
    assert recipe.augment.pad == 10


def test_warm_up_rises_and_the_cosine_falls_to_zero():
    schedule = load_recipe("strong").schedule
    factors = [rate_factor(schedule, step / 1000) for step in range(1001)]
    top = factors.index(max(factors))
    assert top == round(1000 * schedule.warm_up)
    assert max(factors) == pytest.approx(1)
    assert all(a < b for a, b in pairwise(factors[10:top]))
    assert all(a > b for a, b in pairwise(factors[top:]))
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_keys_are_overridden_in_order():
    recipe = load_recipe(
        "paper", ["optim.lr=0.02", "optim.lr=0.03", "optim.name=adam", "model.branches=[1, 2]", "loop.compile=true"]
    )
    assert (recipe.optim.lr, recipe.optim.name, recipe.model.branches, recipe.loop.compile) == (
        0.03,
        "adam",
        (1, 2),
        True,
    )
    assert recipe.schedule == load_recipe("paper").schedule


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.learning_rate=1", "no key 'optim.learning_rate'; did you mean 'optim."),
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("loss.label_smooth=0.1", "did you mean 'loss.label_smoothing'"),
        ("opt.lr=1", "did you mean 'optim.lr'"),
        ("schedule.epoch=3", "did you mean 'schedule.epochs'"),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0"),
        ("optim.name=lamb", "optim.name: Input should be 'sgd' or 'adam'"),
        ("batch.identities=1", "batch.identities: Input should be greater than or equal to 2"),
        ("model.height=8", "model.height: Input should be greater than or equal to 32"),
        ("model.branches=[9]", "model.branches: give one number of stripes (1 to 8) a branch"),
        ("lr=1", "give table.key=value"),
        ("optim.lr", "give table.key=value"),
    ],
)
def test_an_override_that_cannot_be_is_one_sentence(override, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe("paper", [override])
    assert sentence in str(caught.value)


def test_a_file_is_a_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text("[optim]\nlr = 0.5\n")
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.optim.lr == 0.5
    assert recipe == Recipe.model_validate({"optim": {"lr": 0.5}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[optim\n", "not valid TOML"),
        ("[optimizer]\nlr = 1\n", "no key 'optimizer.lr'; did you mean 'optim.lr'"),
        ("epochs = 3\n", "no key 'epochs'"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "mine.toml")


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(tmp_path / "mine.toml")


def test_unknown_recipes_are_named_with_the_known(tmp_path):
    with pytest.raises(UserError, match="no recipe 'papre': choose cpu, paper, small, strong"):
        load_recipe("papre")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("kind", ["steps", "cosine"])
def test_warm_up_is_a_line_from_a_hundredth(kind):
    schedule = Schedule(kind=kind, warm_up=0.2)
    assert [rate_factor(schedule, done) for done in (0, 0.05, 0.1, 0.15)] == pytest.approx([0.01, 0.25, 0.5, 0.75])
