"""What an MGN is: values that a user gives are checked in one sentence, whoever calls."""

from __future__ import annotations

import pytest

from mgn_deploy.config import ModelConfig, parse_branches, parse_size
from mgn_deploy.errors import UserError


def test_a_size_is_height_by_width():
    assert parse_size("384x128") == parse_size("384X128") == (384, 128)


@pytest.mark.parametrize("text", ["", "384", "384x", "384x128x3", "tall x wide"])
def test_a_size_that_is_none_is_one_sentence(text):
    with pytest.raises(UserError, match=f"--size {text}: sizes are like 384x128"):
        parse_size(text)


def test_branches_are_numbers_of_stripes():
    assert parse_branches("1,2,3") == (1, 2, 3)


@pytest.mark.parametrize("text", ["", "1,", "1,x", "1 2"])
def test_branches_that_are_none_are_one_sentence(text):
    with pytest.raises(UserError, match=f"--branches {text}: branches are like 1,2,3"):
        parse_branches(text)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"height": 8}, "height: Input should be greater than or equal to 32"),
        (
            {"branches": (0,)},
            r"branches: give one number of stripes \(1 to 8\) a branch, of 1 to 16 branches, e.g. 1,2,3",
        ),
        ({"pooling": "median"}, "pooling: Input should be 'max', 'avg' or 'gem'"),
        ({"global_stride": 3}, "global_stride: Input should be 1 or 2"),
        ({"std": (0.2, 0, 0.2)}, "std.1: Input should be greater than 0"),
        ({"std": (0.2, 0.2, float("nan"))}, "std.2: Input should be a finite number"),
        ({"mean": (float("inf"), 0, 0)}, "mean.0: Input should be a finite number"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        ModelConfig.checked(**fields)


def test_a_config_is_written_with_all_its_fields_and_read_back():
    config = ModelConfig(pooling="gem")
    written = config.model_dump_json()
    assert all(f'"{name}"' in written for name in ModelConfig.model_fields)
    assert ModelConfig.model_validate_json(written) == config
