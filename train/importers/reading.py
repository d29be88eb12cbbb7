"""A checkpoint file -> named tensors, out of their wrapper and without a common prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mgn_deploy.errors import UserError, first_names
from mgn_deploy.train.tensor_file import read_tensor_file

# Names under which training code keeps the network's state dict, the network of the last step before averages of it.
WRAPPERS = (
    *("model", "state_dict", "model_state_dict", "model_state", "net", "network", "params", "weights", "module"),
    *("ema", "model_ema", "state_dict_ema", "params_ema", "ema_state_dict", "ema_model"),
)
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")  # of DataParallel, torch.compile, an outer module
AVERAGED = "n_averaged"  # beside the tensors of torch.optim.swa_utils.AveragedModel


@dataclass(frozen=True)
class Checkpoint:
    """A state dict: `tensors` by name, floating ones as float32; `beside` is what else the file holds, by name."""

    tensors: dict[str, Tensor]
    beside: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state dict of a file of `torch.save` (also inside dicts: `{"model": ...}`) or of safetensors.

    A prefix that all names have is taken off.

    Raises:
        UserError: no such file, a damaged one, one with Python objects in it (they are not run), or no state dict.
    """
    content = read_tensor_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save `model.state_dict()`")
    beside: tuple[str, ...] = ()
    while not any(isinstance(value, Tensor) for value in content.values()):
        inside = {key: value for key, value in content.items() if _holds_tensors(value)}
        wrapper = next((name for name in WRAPPERS if name in inside), next(iter(inside), None))
        if wrapper is None or (wrapper not in WRAPPERS and len(inside) > 1):
            break
        beside += tuple(str(key) for key in content if key != wrapper)
        content = content[wrapper]
    if AVERAGED in content:
        beside += (AVERAGED,)
        content = {key: value for key, value in content.items() if key != AVERAGED}
    if not _holds_tensors(content):
        raise UserError(f"{path} holds no tensors, but {first_names([str(key) for key in content]) or 'nothing'}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} is not a state dict: under {key!r} is a {type(value).__name__}, no tensor; "
                "save `model.state_dict()`"
            )
    tensors = _without_prefix(content)
    return Checkpoint({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}, beside)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(map(_holds_tensors, value.values())))


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
