"""The state on disk: all of it comes back, whole or not at all, and nothing in it runs."""

from __future__ import annotations

import resource

import pytest
import torch
from bomb import Bomb
from torch import nn

from mgn_deploy.errors import UserError
from mgn_deploy.train.checkpoint import Position, load_checkpoint, save_checkpoint

Parts = tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]


def parts(seed: int, width: int = 2) -> Parts:
    """A model, an optimizer and a scaler, unlike those of another seed."""
    torch.manual_seed(seed)
    model = nn.Linear(3, width)
    return model, torch.optim.Adam(model.parameters(), lr=seed), torch.amp.GradScaler("cpu", init_scale=2.0**seed)


def test_everything_comes_back(tmp_path):
    model, optimizer, scaler = parts(3)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    at = Position(4, 5, 6.5, 0.75, [1.0, 2.0, 3.0])
    save_checkpoint(tmp_path, "recipe", model, optimizer, scaler, at)
    back = parts(4)
    assert load_checkpoint(tmp_path, "recipe", *back) == at
    torch.testing.assert_close(back[0].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert str(back[1].state_dict()) == str(optimizer.state_dict())
    assert back[2].state_dict() == scaler.state_dict()


def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_state(tmp_path):
    save_checkpoint(tmp_path, "recipe", *parts(3), Position(epoch=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            save_checkpoint(tmp_path, "recipe", *parts(3, width=50_000), Position(epoch=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path, "recipe", *parts(3)).epoch == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_state_that_runs_code_is_refused_and_not_run(tmp_path):
    torch.save({"recipe": "recipe", "model": Bomb(tmp_path / "exploded")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        load_checkpoint(tmp_path, "recipe", *parts(3))
    assert not (tmp_path / "exploded").exists()
