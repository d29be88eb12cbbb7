"""Recipes: the paper's numbers, overrides, and sentences for what cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mgn_deploy.errors import UserError
from mgn_deploy.train.recipe import ModelTable, Recipe, Schedule, load_recipe
from mgn_deploy.train.weights import new_model


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
    assert recipe.optim.lr * recipe.schedule.rate_factor(epoch / 80) == pytest.approx(rate)


def test_strong_has_today_s_additions():
    recipe = load_recipe("strong")
    assert recipe.schedule.kind == "cosine"
    assert recipe.schedule.warm_up > 0
    assert recipe.loss.label_smoothing == 0.1
    assert recipe.augment.erase == 0.5
    assert recipe.augment.pad == 10


def test_warm_up_rises_and_the_cosine_falls_to_zero():
    schedule = load_recipe("strong").schedule
    factors = [schedule.rate_factor(step / 1000) for step in range(1001)]
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
        ("model.branches=[]", "model.branches: give one number of stripes (1 to 8) a branch"),
        ("model.branches=3", "model.branches: Input should be a valid list"),
        ("model.branches=[1, 2.5]", "model.branches.1: Input should be a valid integer"),
        ("model.base_width=0", "model.base_width: Input should be greater than or equal to 8"),
        ("model.base_width=-3", "model.base_width: Input should be "),
        ("model.base_width=12", "model.base_width: Input should be a multiple of 8"),
        ("model.reduced_width=0", "model.reduced_width: Input should be greater than or equal to 1"),
        ("model.init=", "model.init: "),
        ("model.init=7", "model.init: Input should be a valid string"),
        ("loop.seed=-1", "loop.seed: Input should be greater than or equal to 0"),
        (f"loop.seed={2**64}", "loop.seed: Input should be less than or equal to 9223372036854775807"),
        ("loop.seed=true", "loop.seed: Input should be a valid integer"),
        ('batch.identities="16"', "batch.identities: Input should be a valid integer"),
        ("batch.images=1000000000000", "batch.images: Input should be less than or equal to 4096"),
        ("optim.lr=1e308", "optim.lr: Input should be less than or equal to 1"),
        ("optim.lr=1e400", "optim.lr: Input should be a finite number"),
        ("optim.lr=inf", "optim.lr: Input should be a finite number"),
        ("optim.lr=nan", "optim.lr: Input should be a finite number"),
        ("loss.margin=inf", "loss.margin: Input should be a finite number"),
        ("schedule.max_seconds=inf", "schedule.max_seconds: Input should be a finite number"),
        ("schedule.epochs=2.5", "schedule.epochs: Input should be a valid integer"),
        ("optim.lr=" + "1" * 5000, "optim.lr: Input should be a valid number"),
        ("schedule.steps=[-1]", "schedule.steps.0: Input should be greater than or equal to 1"),
        ("schedule.epochs=1e30", "schedule.epochs: Input should be a valid integer"),
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
        ("optim = 3\n", "no key 'optim'"),
        ("[[optim]]\nlr = 1\n", "no key 'optim'"),
        ("a = " + "[" * 20_000, "not valid TOML: "),
        ("a = " + "1" * 5000, "not valid TOML: "),
    ],
)
@pytest.mark.parametrize("overrides", [(), ("optim.lr=0.1",)])
def test_a_broken_file_is_one_sentence(tmp_path, text, sentence, overrides):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "mine.toml", overrides)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path, encoding):
    (tmp_path / "mine.toml").write_text("# caf\u00e9\n[optim]\nlr = 0.5\n", encoding)
    with pytest.raises(UserError, match=r"not valid TOML: byte \d is not UTF-8, save it as that"):
        load_recipe(tmp_path / "mine.toml")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text("[optim]\nlr = 0.5\n", "utf-8-sig")
    assert load_recipe(tmp_path / "mine.toml").optim.lr == 0.5


def test_what_training_starts_from_overrides_the_recipe(tmp_path):
    assert load_recipe("small", ["model.init=imagenet"], tmp_path / "weights").model.init == str(tmp_path / "weights")
    assert load_recipe("small", ["model.init=imagenet"]).model.init == "imagenet"


@pytest.mark.parametrize(
    "changes",
    [{"height": 33, "width": 17}, {"height": 97, "width": 31}, {"reduced_width": 7}, {"branches": (1, 8)}],
)
def test_odd_sizes_that_are_allowed_do_train(changes):
    small = {"backbone": "resnet18", "base_width": 8, "reduced_width": 8, "height": 48, "width": 16}
    config = ModelTable(**{**small, **changes}).config(num_classes=3)
    output = new_model(config).train()(torch.zeros(2, 3, config.height, config.width))
    assert [tuple(logits.shape) for logits in output.logits] == [(2, 3)] * len(output.logits)


def test_a_width_that_a_resnext_cannot_take_is_one_sentence():
    config = ModelTable(backbone="resnext50_32x4d", base_width=8).config(num_classes=3)
    with pytest.raises(UserError, match=r"^base_width 8: a resnext50_32x4d takes 16 or more"):
        new_model(config)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_one_sentence(seed):
    with pytest.raises(UserError, match=f"^--seed {seed}: seeds are 0 to"):
        new_model(ModelTable(base_width=8).config(num_classes=0), seed=seed)


def test_unknown_recipes_are_named_with_the_known(tmp_path):
    with pytest.raises(UserError, match="no recipe 'papre': choose cpu, paper, small, strong"):
        load_recipe("papre")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("kind", ["steps", "cosine"])
def test_warm_up_is_a_line_from_a_hundredth(kind):
    schedule = Schedule(kind=kind, warm_up=0.2)
    assert [schedule.rate_factor(done) for done in (0, 0.05, 0.1, 0.15)] == pytest.approx([0.01, 0.25, 0.5, 0.75])
