"""Reading a file of tensors that somebody else wrote. Nothing in it is run: `weights_only=True`, or safetensors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from mgn_deploy.errors import UserError
from mgn_deploy.files import is_utf8
from mgn_deploy.train.file_kind import AGAIN, STATE_DICT, is_safetensors


def read_tensor_file(path: Path) -> Any:
    """Read what `torch.save` wrote, or the tensors by name of a `.safetensors` file, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one with Python objects in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path) if is_utf8(path) else load(path.read_bytes())  # it opens no path that is not UTF-8
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from None


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
