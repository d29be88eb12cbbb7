"""The state on disk: all of it comes back, whole or not at all, and nothing in it runs."""

from __future__ import annotations

import json
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from bomb import Bomb
from torch import nn

from mgn_deploy.errors import UserError
from mgn_deploy.train.checkpoint import Position, State, load_checkpoint, restore, save_checkpoint
from mgn_deploy.train.started import Started

STARTED = Started({"optim.lr": 0.1}, {}, 1, {"a.jpg": [1, 1, 100, 5], "b.jpg": [2, 1, 100, 6]}, [1, 2], "")

Parts = tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]


def parts(seed: int, width: int = 2) -> Parts:
    """A model, an optimizer and a scaler, unlike those of another seed."""
    torch.manual_seed(seed)
    model = nn.Linear(3, width)
    return model, torch.optim.Adam(model.parameters(), lr=seed), torch.amp.GradScaler("cpu", init_scale=2.0**seed)


def save(folder: Path, started: Started, at: Position, *parts) -> None:
    model, optimizer, scaler = (part.state_dict() for part in parts)
    save_checkpoint(folder, State(started, model, optimizer, scaler, at))


def test_everything_comes_back(tmp_path):
    model, optimizer, scaler = parts(3)
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    at = Position(4, 5, 6.5, 0.75, [1.0, 2.0, 3.0], {"epoch": 4, "loss": 0.5})
    save(tmp_path, STARTED, at, model, optimizer, scaler)
    back = parts(4)
    state = load_checkpoint(tmp_path)
    restore(state, STARTED.people, *back)
    assert (state.position, state.started) == (at, STARTED)
    torch.testing.assert_close(back[0].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert str(back[1].state_dict()) == str(optimizer.state_dict())
    assert back[2].state_dict() == scaler.state_dict()


def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_state(tmp_path):
    save(tmp_path, STARTED, Position(epoch=1), *parts(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            save(tmp_path, STARTED, Position(epoch=2), *parts(3, width=50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path).position.epoch == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_state_that_runs_code_is_refused_and_not_run(tmp_path):
    torch.save({"started": json.dumps(asdict(STARTED)), "model": Bomb(tmp_path / "exploded")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


class Heads(nn.Module):
    """A module with a row for each of some people."""

    def __init__(self, people: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.classifiers = nn.ModuleList([nn.Linear(3, people, bias=False)])
        self.body = nn.Linear(3, 2)


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam])
def test_people_who_stay_keep_their_rows_where_others_come_and_go(tmp_path, optimizer):
    before, after = Heads(3, seed=1), Heads(4, seed=2)
    fresh = after.classifiers[0].weight.detach().clone()
    own = optimizer(before.parameters())
    (before.classifiers[0](torch.ones(1, 3)).sum() * 5 + before.body(torch.ones(1, 3)).sum()).backward()
    own.step()
    started = Started({}, {}, 1, {}, [4, 7, 9], "")
    save(tmp_path, started, Position(), before, own, torch.amp.GradScaler("cpu", enabled=False))
    theirs = optimizer(after.parameters())
    restore(load_checkpoint(tmp_path), [7, 8, 9, 12], after, theirs, torch.amp.GradScaler("cpu", enabled=False))
    old, new = before.classifiers[0].weight, after.classifiers[0].weight
    assert torch.equal(new[[0, 2]], old[[1, 2]])
    assert torch.equal(new[[1, 3]], fresh[[1, 3]])
    assert torch.equal(after.body.weight, before.body.weight)
    for key, gathered in own.state[old].items():
        if gathered.ndim == 2:
            assert torch.equal(theirs.state[new][key][[0, 2]], gathered[[1, 2]])
            assert not theirs.state[new][key][[1, 3]].any()
    assert len(theirs.state[new]) == len(own.state[old]) > 0
