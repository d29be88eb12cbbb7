"""What a machine cannot hold is refused with the keys to change, before it is tried or when it fails."""

from __future__ import annotations

import pytest
import torch
from small_runs import TINY, draw_people

from mgn_deploy.config import ModelConfig
from mgn_deploy.errors import UserError
from mgn_deploy.train import memory
from mgn_deploy.train.memory import explained_memory, require_memory
from mgn_deploy.train.recipe import load_recipe
from mgn_deploy.train.trainer import train
from mgn_deploy.train.weights import new_model


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Where a container's limit is read from: a file that a test may write."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
    return tmp_path / "memory.max"


def test_a_model_that_the_machine_cannot_hold_is_refused(container):
    container.write_text(f"{200 << 20}\n")
    with pytest.raises(UserError, match=r"takes 0\.3 GiB of memory or more, and there are 0\.2 here: .*base_width"):
        new_model(ModelConfig())


def test_a_batch_that_no_machine_holds_is_refused_before_the_first_step(tmp_path):
    people = draw_people(tmp_path / "people")
    recipe = load_recipe("small", [*TINY, "batch.images=4096", "model.height=4096", "model.width=4096"])
    with pytest.raises(UserError, match=r"GiB of memory or more.*batch.images"):
        train(people, recipe, tmp_path / "run", device="cpu")


def test_a_container_without_a_limit_has_the_machines_memory(container):
    require_memory(2**20)
    container.write_text("max\n")
    require_memory(2**20)
    container.write_text("1000\n")
    with pytest.raises(UserError):
        require_memory(2**20)


def test_an_allocation_that_fails_is_a_sentence():
    with pytest.raises(UserError, match="the memory does not hold this: choose smaller batches"), explained_memory():
        torch.empty(2**50)


def test_other_errors_go_on_as_they_are():
    with pytest.raises(RuntimeError, match="size of tensor"), explained_memory():
        torch.ones(2) + torch.ones(3)
