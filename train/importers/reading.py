"""A checkpoint file -> named tensors. Nothing in the file is run: `weights_only=True`, or safetensors."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mgn_deploy.errors import UserError

WRAPPERS = ("model", "state_dict", "net", "network", "model_state_dict")
PREFIXES = ("module.", "model.")  # of DataParallel, and of a module that holds the network


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: floating ones as float32, names without a prefix that all had. `beside`: what else the file holds."""

    tensors: dict[str, Tensor]
    beside: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """The state dict of a file of `torch.save` (also inside a wrapper: `{"model": ...}`) or of safetensors.

    Raises:
        UserError: no such file, a damaged one, one with Python objects in it (they are not run), or no state dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
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
                f"{path} is not a state dict: under {key!r} is a {type(value).__name__}, no tensor; save `model.state_dict()`"
            )
    return Checkpoint(
        {key: value.float() if value.is_floating_point() else value for key, value in _unprefixed(content).items()},
        beside,
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): copy it anew") from None


def _read_torch(path: Path) -> Any:
    try:
        # fast-reid keeps the best metric beside the model, as a NumPy number.
        with torch.serialization.safe_globals(_numpy_numbers()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol: what matters is whether it can be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a foreign file; the reason goes into the sentence
        unsafe = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if unsafe:
            raise UserError(
                f"{path} holds Python objects ({unsafe[1]}), and reading them could run code: "
                "save `model.state_dict()` where it was made"
            ) from None
        reason = next((line for line in str(error).splitlines() if line), "it ends too early")[:120]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}): it is damaged, or something else"
        ) from None


def _numpy_numbers() -> list[Any]:
    """What a pickled NumPy number is made of, under NumPy's old and new module names. It rebuilds numbers and runs nothing."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8")}
    return [*((scalar, name) for name in names), np.dtype, *kinds]


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
