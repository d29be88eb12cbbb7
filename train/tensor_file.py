"""Reading a file of tensors that somebody else wrote. Nothing in it is run: `weights_only=True`, or safetensors."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from mgn_deploy.errors import UserError, first_names
from mgn_deploy.files import is_utf8
from mgn_deploy.train.file_kind import AGAIN, STATE_DICT, is_safetensors

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


def read_tensor_file(path: Path) -> Any:
    """Read what `torch.save` wrote, or the tensors by name of a `.safetensors` file, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one with Python objects in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    if not is_safetensors(path):
        return _read_torch(path)
    try:
        return load_file(path) if is_utf8(path) else load(path.read_bytes())  # it opens no path that is not UTF-8
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from None


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


def _read_torch(path: Path) -> Any:
    try:
        # fast-reid keeps the best metric beside the model, as a NumPy number.
        with torch.serialization.safe_globals(_numpy_numbers()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is whether it can be read
            with open(path, "rb") as file:  # of a path, torch.load looks at the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a foreign file; the message says what
        unsafe = re.search(r"(?:unsupported|Unsupported) (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error))
        if unsafe:
            raise UserError(
                f"{path} cannot be read as weights: it holds Python objects ({unsafe[1]}), and reading them could run "
                f"code; {STATE_DICT}"
            ) from None
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or no file of torch.save or "
            f"safetensors; {AGAIN}, or {STATE_DICT}"
        ) from None


def _numpy_numbers() -> list[Any]:
    """List what a pickled NumPy number is made of, under NumPy's old and new module names: it runs nothing."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8")}
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(map(_holds_tensors, value.values())))


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
