"""The state of a run on disk, so that an interrupted run goes on and ends with the same bits."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgn_deploy.errors import UserError
from mgn_deploy.files import write_bytes
from mgn_deploy.train.started import Started

LAST = "last.pt"
HEADS = "classifiers."  # tensors with a row for each of the people who are trained on


@dataclass
class Position:
    """Where a run is. All randomness is a function of the seed and of `epoch` and `batch`, the next ones from 0.

    `seconds` is the time trained, `best_map` the highest mAP so far (a fraction; -1: none), and `losses` are sums over
    the epoch's batches so far: loss, softmax, triplet. `row` is what the log is to say of the last epoch and may not
    yet.
    """

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best_map: float = -1.0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    row: dict[str, float] | None = None


@dataclass
class State:
    """What `last.pt` holds."""

    started: Started
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    position: Position


def save_checkpoint(folder: Path, state: State) -> None:
    """Write `last.pt` into the run's folder, whole or not at all.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    plain = {"started": json.dumps(asdict(state.started)), "position": asdict(state.position)}
    content = io.BytesIO()  # in memory: of a full disk torch.save would raise something that is no OSError
    torch.save(vars(state) | plain, content)
    write_bytes(folder / LAST, content.getbuffer())


def load_checkpoint(folder: Path) -> State | None:
    """Read what `save_checkpoint` wrote; None where there is no `last.pt`.

    Raises:
        UserError: the file is damaged, or something else.
    """
    path = folder / LAST
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        started, at = Started(**json.loads(state["started"])), Position(**state["position"])
        return State(**state | {"started": started, "position": at})
    except Exception as error:  # torch.load raises nearly anything on a damaged file; the reason goes into the sentence
        raise UserError(
            f"{path} is damaged, or of another release ({type(error).__name__}): delete it to start the run again"
        ) from None


def restore(
    state: State,
    people: list[int | str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Give model, optimizer and scaler the state of a run.

    Args:
        state: the run's.
        people: the identities now, in the order of their classes. A person whom the run knows keeps the weights of
            their class, and what the optimizer has gathered of them; a new one has the model's, and nothing gathered.
        model, optimizer, scaler: of the run that goes on.
    """
    before = state.started.people
    if people != before:
        old = [before.index(one) for one in people if one in before]
        new = [index for index, one in enumerate(people) if one in before]

        def moved(rows: Tensor, onto: Tensor) -> Tensor:
            onto = onto.detach().cpu().clone()
            onto[new] = rows[old]
            return onto

        own = model.state_dict()
        names = [name for name, _ in model.named_parameters()]
        for name in names:
            if name.startswith(HEADS):
                state.model[name] = moved(state.model[name], own[name])
        for index, gathered in state.optimizer["state"].items():
            for key, value in gathered.items():
                if names[index].startswith(HEADS) and value.ndim == 2:  # Adam's step is one number
                    gathered[key] = moved(value, torch.zeros_like(own[names[index]]))
    model.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    scaler.load_state_dict(state.scaler)
