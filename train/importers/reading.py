"""A checkpoint file -> named tensors, out of their wrapper and without a common prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mgn_deploy.errors import UserError
from mgn_deploy.train.tensor_file import read_tensor_file

WRAPPERS = ("model", "state_dict", "net", "network", "model_state_dict")
PREFIXES = ("module.", "model.")  # of DataParallel, and of a module that holds the network


@dataclass(frozen=True)
class Checkpoint:
    """A state dict: `tensors` by name, floating ones as float32; `beside` is what else the file holds, by name."""

    tensors: dict[str, Tensor]
    beside: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state dict of a file of `torch.save` (also inside a wrapper: `{"model": ...}`) or of safetensors.

    A prefix that all names have is taken off.

    Raises:
        UserError: no such file, a damaged one, one with Python objects in it (they are not run), or no state dict.
    """
    content = read_tensor_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save `model.state_dict()`")
    beside: tuple[str, ...] = ()
    for wrapper in WRAPPERS:
        inside = content.get(wrapper)
        if isinstance(inside, dict) and any(isinstance(value, Tensor) for value in inside.values()):
            beside = tuple(str(key) for key in content if key != wrapper)
            content = inside
            break
    if not content:
        raise UserError(f"{path} holds no tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} is not a state dict: under {key!r} is a {type(value).__name__}, no tensor; "
                "save `model.state_dict()`"
            )
    tensors = _without_prefix(content)
    return Checkpoint({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}, beside)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
