"""The state of a run on disk, so that an interrupted run goes on and ends with the same bits."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from mgn_deploy.errors import UserError
from mgn_deploy.files import atomic_file

LAST = "last.pt"


@dataclass
class Position:
    """Where a run is. All randomness is a function of the seed and of `epoch` and `batch`, the next ones from 0.

    `seconds` is the time trained, `best_map` the highest mAP so far (a fraction; -1: none), and `losses` are sums over
    the epoch's batches so far: loss, softmax, triplet.
    """

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best_map: float = -1.0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


def save_checkpoint(
    folder: Path,
    recipe: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    at: Position,
) -> None:
    """Write `last.pt`, whole or not at all.

    Args:
        folder: the run's.
        recipe: what a run that goes on has to equal: recipe, data, number of ranks.
        model, optimizer, scaler: whose state is saved.
        at: where the run is.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    state = {
        "recipe": recipe,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "position": asdict(at),
    }
    content = io.BytesIO()
    torch.save(state, content)  # into memory: of a full disk it would raise something that is no OSError
    with atomic_file(folder / LAST) as file:
        file.write(content.getbuffer())


def load_checkpoint(
    folder: Path, recipe: str, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Position:
    """Restore what `save_checkpoint` wrote, and return where that run is: at its start, where there is no `last.pt`.

    Raises:
        UserError: the file is damaged, or of a run with another recipe or other data.
    """
    path = folder / LAST
    if not path.is_file():
        return Position()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file; the reason goes into the sentence
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it to start the run again") from None
    if state["recipe"] != recipe:
        raise UserError(
            f"{os.fspath(folder)} holds a run with another recipe or other data: choose another folder for this one"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return Position(**state["position"])
